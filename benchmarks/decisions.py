"""How often `sparsify(..., only_if_faster=True)` decides right, alone and beside a busy process, and how long it takes:
python benchmarks/decisions.py.

What is right says a race of its own, longer, alone, and by other rules (`_measure.py`). Where the two layers are within
5 % of each other, either decision is right.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _measure
from torch_bridge import sparsify

CLOSE = 1.05
BUSY = "import time\nwhile True: sum(range(10**5))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny cells, to see that it runs")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the truth about each cell")
    parser.add_argument("--out", default="benchmarks/results/decisions.json")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cells = [_cell(*each, 0.1 if args.quick else args.seconds) for each in _grid(args.quick)]
    for name, others in {"alone": contextlib.nullcontext, "busy": _busy}.items():
        with others():
            for cell in cells:
                cell[name] = _decision(cell)
    _print(cells)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"machine": _measure.machine(("torch", "numpy")), "cells": cells}
    out.write_text(json.dumps(run, indent=1) + "\n")
    print(f"numbers: {out}")


def _grid(quick: bool) -> Iterator[tuple[dict, int, int]]:
    """(rule, features, rows): of block-diagonal layers those of `torch_layers.py` that have a dense twin."""
    rules = [{"kind": "block_diag", "num_blocks": n} for n in (2, 4, 8, 16)]
    rules += [{"kind": "sparse", "density": d} for d in (0.05, 0.1, 0.25, 0.5)]
    rules += [{"kind": "block_sparse", "density": d, "block": b} for d in (0.1, 0.25, 0.5) for b in (16, 32)]
    sizes, rows = ((64,), (8,)) if quick else ((128, 512, 2048), (8, 128))
    yield from itertools.product(rules[:3] if quick else rules, sizes, rows)


def _cell(rule: dict, features: int, rows: int, seconds: float) -> dict:
    """A workload and what is right about it."""
    dense = _model(features)
    sparse = copy.deepcopy(dense)
    sparsify(sparse, [("0", rule)])
    with _measure.Load() as load:
        calls = {name: _step(model, features, rows) for name, model in (("dense", dense), ("sparse", sparse))}
        builders = {name: lambda call=call: call for name, call in calls.items()}
        found = _measure.measure(builders, np.ones(1), seconds, 5.0, tuple(builders))
    ratio = _measure.ratio(found["dense"], found["sparse"])
    return {"rule": rule, "features": features, "rows": rows, "times_as_fast": ratio, "load_of_others": load.of_others}


def _decision(cell: dict) -> dict:
    start = time.perf_counter()
    report = sparsify(
        _model(cell["features"]), [("0", cell["rule"])], dry_run=True, only_if_faster=True, batch=cell["rows"]
    )
    (row,) = report
    replaces, ratio = row.kind != "dense", cell["times_as_fast"]
    right = replaces == (ratio > 1) or 1 / CLOSE < ratio < CLOSE
    return {
        "replaces": replaces,
        "right": right,
        "ms": row.milliseconds,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _model(features: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, features))


def _step(model: nn.Module, features: int, rows: int) -> Callable[[], np.ndarray]:
    x, done = torch.randn(rows, features, requires_grad=True), np.ones(1)
    wanted = [x, *model.parameters()]

    def step() -> np.ndarray:
        torch.autograd.grad(model(x).sum(), wanted)
        return done

    return step


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """Another process, on one core."""
    other = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def _print(cells: list[dict]) -> None:
    for cell in cells:
        said = "  ".join(
            f"{name} {'sparse' if d['replaces'] else 'dense'}{'' if d['right'] else ' (wrong)'} in {d['seconds']} s"
            for name in ("alone", "busy")
            for d in [cell[name]]
        )
        print(f"{cell['rule']}, {cell['features']}, {cell['rows']} rows: {cell['times_as_fast']:.2f}x; {said}")
    for name in ("alone", "busy"):
        right = sum(cell[name]["right"] for cell in cells)
        print(f"{name}: {right} of {len(cells)} right, {100 * right / len(cells):.1f} %")


if __name__ == "__main__":
    main()
