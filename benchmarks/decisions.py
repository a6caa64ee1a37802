"""How often `sparsify(..., only_if_faster=True)` decides right, alone and beside a busy process, and how long it takes:
python benchmarks/decisions.py.

What is right say two races of their own, longer, alone, and by other rules (`_measure.py`), one before and one after
the decisions. Where they contradict each other, or the two layers are within 5 % of each other, either decision is
right; such cells are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few tiny cells, to see that it runs")
    parser.add_argument("--seconds", type=float, default=1.5, help="for the truth about each cell")
    parser.add_argument("--out", default="benchmarks/results/decisions.json")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    seconds = 0.1 if args.quick else args.seconds
    cells = [_cell(*each) for each in _grid(args.quick)]
    _race(cells, seconds)
    for name, others in {"alone": contextlib.nullcontext, "busy": _busy}.items():
        with others():
            for cell in cells:
                cell[name] = _decision(cell)
    _race(cells, seconds)
    _judge(cells)
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


def _cell(rule: dict, features: int, rows: int) -> dict:
    return {"rule": rule, "features": features, "rows": rows, "times_as_fast": [], "load_of_others": []}


def _race(cells: list[dict], seconds: float) -> None:
    """One more truth about each workload: how many times as fast the sparse layer is."""
    for cell in cells:
        dense = _model(cell["features"])
        sparse = copy.deepcopy(dense)
        sparsify(sparse, [("0", cell["rule"])])
        with _measure.Load() as load:
            models = {"dense": dense, "sparse": sparse}
            calls = {name: _step(model, cell["features"], cell["rows"]) for name, model in models.items()}
            builders = {name: lambda call=call: call for name, call in calls.items()}
            found = _measure.measure(builders, np.ones(1), seconds, 5.0, tuple(builders))
        cell["times_as_fast"].append(_measure.ratio(found["dense"], found["sparse"]))
        cell["load_of_others"].append(load.of_others)


def _decision(cell: dict) -> dict:
    start = time.perf_counter()
    report = sparsify(
        _model(cell["features"]), [("0", cell["rule"])], dry_run=True, only_if_faster=True, batch=cell["rows"]
    )
    (row,) = report
    seconds = round(time.perf_counter() - start, 2)
    return {"replaces": row.kind != "dense", "ms": row.milliseconds, "seconds": seconds}


def _judge(cells: list[dict]) -> None:
    for cell in cells:
        before, after = cell["times_as_fast"]
        ratio = math.sqrt(before * after)
        cell["open"] = (before > 1) != (after > 1) or 1 / CLOSE < ratio < CLOSE
        for name in ("alone", "busy"):
            cell[name]["right"] = cell["open"] or cell[name]["replaces"] == (ratio > 1)


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
        ratios = " and ".join(f"{ratio:.2f}x" for ratio in cell["times_as_fast"])
        print(f"{cell['rule']}, {cell['features']}, {cell['rows']} rows: {ratios}; {said}")
    clear = [cell for cell in cells if not cell["open"]]
    print(f"{len(cells) - len(clear)} of {len(cells)} cells are too close to call")
    for name in ("alone", "busy"):
        right = sum(cell[name]["right"] for cell in clear)
        share = (right + len(cells) - len(clear)) / len(cells)
        print(f"{name}: {right} of {len(clear)} clear cells right; {100 * share:.1f} % of all, if the close ones count")


if __name__ == "__main__":
    main()
