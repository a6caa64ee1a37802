"""What it costs to come from a pruned model: python benchmarks/loading.py.

Two comparisons, each in one process and in turns, medians of the rounds:

- one pruned weight from a file (sparse-bitmask and `.npz`, by `jaxsparse.files.read`), beside torch reading the dense
  one from safetensors and making a CSR tensor of it;
- a RoBERTa of 6 layers, of which torch.nn.utils.prune pruned the 18 linear ones behind attention and in the MLPs,
  converted by `torch_bridge.sparsify`, beside `copy.deepcopy` of the dense model.

Files are in the cache of the operating system, as they are after a download.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch.nn.utils import prune
from transformers import RobertaConfig, RobertaModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _measure
from jaxsparse import files
from torch_bridge import sparsify

PACKAGES = ("jax", "torch", "scipy", "safetensors", "transformers")
WHERE = r"encoder\.layer\.\d+\.(attention\.output|intermediate|output)\.dense"
KEPT = [(WHERE, {"kind": "sparse", "keep": "nonzero"})]
DENSITY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--out", default="benchmarks/results/loading.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rounds = 2 if args.quick else 15
    with tempfile.TemporaryDirectory() as folder, _measure.Load() as load:
        cells = {
            "one weight from a file": _in_turns(_loaders(256 if args.quick else 4096, Path(folder)), rounds),
            "a pruned RoBERTa": _in_turns(_converters(args.quick), rounds),
        }
    _print(cells, load.of_others)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"machine": _measure.machine(PACKAGES), "load_of_others": load.of_others, "cells": cells}
    out.write_text(json.dumps(run, indent=1) + "\n")
    print(f"numbers: {out}")


def _loaders(size: int, folder: Path) -> dict[str, tuple[Callable, Callable]]:
    """By name: (a call, what is to be done after it untimed). The first is the baseline."""
    rng = np.random.default_rng(0)
    w = np.where(rng.random((size, size)) < DENSITY, rng.normal(size=(size, size)), 0).astype(np.float32)
    parts = {"compressed": w[w != 0], "bitmask": np.packbits(w != 0, axis=1, bitorder="little")}
    counts = np.count_nonzero(w, axis=1)
    parts |= {"shape": np.array(w.shape), "row_offsets": np.cumsum(counts) - counts}
    save_file({f"weight.{name}": a for name, a in parts.items()}, folder / "bitmask.safetensors")
    save_file({"weight": w}, folder / "dense.safetensors")
    scipy.sparse.save_npz(folder / "weight.npz", scipy.sparse.csr_array(w), compressed=False)
    scipy.sparse.save_npz(folder / "packed.npz", scipy.sparse.csr_array(w))

    def read(name: str, key: str) -> Callable:
        def call():
            pattern, values = files.read(folder / name)[key]
            for a in (*pattern.index, values):
                np.asarray(a)  # waits for it

        return call

    def read_dense():
        load_file(folder / "dense.safetensors")["weight"].to_sparse_csr()

    calls = {
        "torch: dense safetensors, to_sparse_csr": read_dense,
        "ours: sparse-bitmask": read("bitmask.safetensors", "weight"),
        "ours: .npz": read("weight.npz", "matrix"),
        "ours: .npz, compressed": read("packed.npz", "matrix"),
        "SciPy: .npz, compressed": lambda: scipy.sparse.load_npz(folder / "packed.npz"),
    }
    return {name: (call, _nothing) for name, call in calls.items()}


def _converters(quick: bool) -> dict[str, tuple[Callable, Callable]]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 99} if quick else {}
    model = RobertaModel(RobertaConfig(num_hidden_layers=6, **sizes))
    linear = [m for path, m in model.named_modules() if _is_pruned(path, m)]
    prune.global_unstructured([(m, "weight") for m in linear], prune.L1Unstructured, amount=1 - DENSITY)
    for m in linear:
        prune.remove(m, "weight")
    reports = []

    def convert():
        reports.append(sparsify(model, KEPT))

    return {
        "copy.deepcopy of the dense model": (lambda: copy.deepcopy(model), _nothing),
        "ours: sparsify, keep what is not zero": (convert, lambda: reports.pop().revert()),
    }


def _is_pruned(path: str, m: torch.nn.Module) -> bool:
    return isinstance(m, torch.nn.Linear) and re.fullmatch(WHERE, path) is not None


def _nothing() -> None:
    pass


def _in_turns(contenders: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, dict]:
    """Milliseconds of every call in every round, in a new order each; the first round, which warms up, is left out."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    rng = np.random.default_rng(0)
    for turn in range(rounds + 1):
        for name in rng.permutation(list(contenders)):
            call, after = contenders[name]
            time.sleep(_measure.PAUSE)
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            after()
            if turn:
                results[name].append(1e3 * took)
    baseline = next(iter(results.values()))
    return {
        name: {"ms": float(np.median(ms)), "of_baseline": float(np.median(np.divide(ms, baseline))), "rounds": ms}
        for name, ms in results.items()
    }


def _print(cells: dict, load) -> None:
    for title, cell in cells.items():
        print(f"\n== {title}; ms, median of the rounds, and of the ratios to the first")
        for name, result in cell.items():
            print(f"  {name:44s}{result['ms']:10.1f}{result['of_baseline']:8.2f}")
    print(f"\ncores busy with other processes: {load}")


if __name__ == "__main__":
    main()
