"""How fast the layers are on this CPU, side by side with what else one could pick: python benchmarks/cpu.py.

Every cell of the grid runs all contenders in one process, on the same float32 numbers and the same number of
threads, in turns (`_measure.py`). Compilation is excluded, but for the family "first call", which is nothing else.
A training step is the forward product, the gradients of input and weight, and the optimizer, with a given upstream
gradient; layers have no bias. SGD is the optimizer unless a label says Adam: it favours dense weights, of which
it touches ten times as many.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _figure, _judge, _measure, _peers_jax, _peers_torch, _report
from benchmarks._problems import Cell, Problem, grid

PACKAGES = ("jaxsparse", "jax", "jaxlib", "torch", "sparselab", "numpy", "scipy")
DENSE = (*_judge.DENSE, *_judge.PRODUCT)  # timed in turns however slow, where they are what counts


def main() -> None:
    args = _arguments()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _peers_torch.use_all_cores()
    run = {"machine": _measure.machine(PACKAGES), "judged": args.judge, "quick": args.quick, "cells": []}
    run["limits"] = _limits(512 if args.quick else 2048) | _measure.cache_rates()
    print(_report.heading(run), flush=True)
    for family, cells in grid(args.quick).items():
        if args.only not in (None, family):
            continue
        measured = _run_family(cells, args)
        run["cells"] += measured
        print(_report.family_table(family, measured), flush=True)
        run["machine"]["load_after"] = os.getloadavg()
        run["judgements"] = _judge.judge(run["cells"], args.judge)
        out.write_text(json.dumps(run, indent=1) + "\n")  # after each family: a run that is stopped leaves something
    print(_report.judgement_table(run["judgements"]))
    print(f"numbers: {out}")
    picture = _figure.draw(run, out.with_suffix(".png"))
    print(f"picture: {picture}")


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--only", choices=list(grid(True)), help="one family of workloads")
    parser.add_argument("--judge", choices=("ours", "ours (xla)"), default="ours", help="who the verdicts are about")
    parser.add_argument("--out", default="benchmarks/results/cpu.json", help="the PNG lies beside it")
    return parser.parse_args()


def _run_family(cells: list[Cell], args) -> list[dict]:
    seconds, longest = (0.1, 0.5) if args.quick else (2.0, 0.5)
    key, problem, too_slow, measured = None, None, {}, []
    for number, cell in enumerate(cells, 1):
        _report.progress(f"{cell.family} {number}/{len(cells)}: {cell.label}")
        if 4 * cell.stored > 1e9:
            measured.append({**_describe(cell), "skipped": f"{4 * cell.stored / 1e9:.1f} GB of weights", "results": {}})
            continue
        if key != (key := (cell.batch, cell.shape, cell.density, cell.block)):
            problem, too_slow = None, {}
            gc.collect()
            problem = Problem(cell)
        with _measure.Load() as load:
            if cell.family == "first call":
                compilers = _peers_jax.first_call(cell, problem)
                results = _measure.compile_times(compilers, jax.clear_caches, 2 if args.quick else 7)
            else:
                builders = _peers_jax.builders(cell, problem) | _peers_torch.builders(cell, problem)
                builders |= {name: _refuses(reason) for name, reason in too_slow.items() if name in builders}
                kept = (args.judge, *(() if cell.num_blocks else DENSE))
                results = _measure.measure(builders, problem.first_rows, seconds, longest, kept)
        too_slow |= {
            n: f"one {cell.mode} call takes {r.ms / 1e3:.1f} s" for n, r in results.items() if len(r.rounds) == 1
        }
        measured.append({**_describe(cell), "load_of_others": load.of_others, "results": _numbers(results)})
    _report.progress("")
    return measured


def _refuses(reason: str):
    def build():
        raise TimeoutError(reason)

    return build


def _describe(cell: Cell) -> dict:
    fields = ("family", "label", "batch", "shape", "density", "block", "mode", "optimizer", "num_blocks")
    return {name: getattr(cell, name) for name in fields} | {"useful_flops": cell.useful_flops}


def _numbers(results: dict[str, _measure.Result]) -> dict[str, dict]:
    return {
        name: {"ms": r.ms, "rounds": [round(ms, 5) for ms in r.rounds], "note": r.note} for name, r in results.items()
    }


def _limits(n: int) -> dict:
    x = np.random.default_rng(0).standard_normal((n, n), np.float32)
    xj, xt, many = jnp.array(x), torch.tensor(x), torch.ones(n * n * 16)
    product = jax.jit(jnp.matmul)
    return _measure.machine_limits(
        lambda: product(xj, xj).block_until_ready(), lambda: xt @ xt, 2 * n**3, many.sum, many.nbytes
    )


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
