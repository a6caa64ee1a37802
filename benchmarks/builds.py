"""Two builds of the CPU kernels side by side, product by product: python benchmarks/builds.py OLD.so NEW.so

Both libraries are loaded into one process, get the same float32 operands, and take turns. One thread by default, timed
by its own clock, which stands still while other processes have the core; `--threads N` uses torch's team and the
wall clock. With `--fresh` the inputs are written anew before every call, as the layer before would. A ratio is the
median over rounds of old / new: above 1, the new build is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _report
from benchmarks._problems import Cell, Problem, grid
from cpu_kernels import direct

FAMILIES = ("unstructured", "blocks", "small batch", "large batch", "block-diagonal")
SPREAD = 5e-4  # how far results may lie apart, by the largest
MOST_BYTES = 5e8  # of weights in a cell
Results = dict[str, np.ndarray]


def main() -> None:
    args = _arguments()
    torch = _torch_with(args.threads)
    libraries = [_opened(path, args.isa) for path in (args.old, args.new)]
    both = [direct.Kernels(torch, library) for library in libraries]
    run = {"machine": _machine(libraries[0], args), "cells": []}
    for family in args.only or FAMILIES:
        for cell in _cells(family, args.quick):
            _report.progress(cell.label)
            run["cells"] += _compared(cell, both, torch, args)
            gc.collect()
        _report.progress("")
        print(_table(family, run["cells"]), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(run, indent=1) + "\n")


def _arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", help="the library to compare with")
    parser.add_argument("new", help="the library that is judged")
    parser.add_argument("--isa", help="amx, avx512, avx2 or portable; the best this machine has by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="write the inputs anew before every call")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="one family of workloads; may be repeated")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", help="a JSON file with all numbers")
    return parser.parse_args()


def _opened(path: str, isa: str | None) -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(path).resolve()))
    library.jaxsparse_cpu_isa.restype = ctypes.c_char_p
    library.jaxsparse_cpu_use_isa.argtypes = [ctypes.c_char_p]
    if isa and not library.jaxsparse_cpu_use_isa(isa.encode()):
        raise SystemExit(f"{path} can't run {isa} on this machine; it runs {library.jaxsparse_cpu_isa().decode()}")
    return library


def _torch_with(threads: int):
    if threads == 1:
        return None
    import torch

    torch.set_num_threads(threads)
    return torch


def _cells(family: str, quick: bool) -> list[Cell]:
    """The grid of cpu.py, each workload once: forward and training share their products."""
    cells = [cell for cell in grid(quick)[family] if cell.mode == "forward"]
    return [cell for cell in cells if 4 * cell.stored < MOST_BYTES]


def _compared(cell: Cell, both: list[direct.Kernels], torch, args) -> list[dict]:
    problem, old, new = Problem(cell), *both
    found = []
    for name in _products(old, problem, torch):
        (call_old, y_old), (call_new, y_new) = (_products(k, problem, torch)[name] for k in (old, new))
        call_old()
        call_new()
        if not (apart := max(map(_apart, y_old, y_new))) < SPREAD:
            raise SystemExit(f"{cell.label}, {name}: the results of the two builds lie {apart:.1e} apart")
        before = _writer(problem, torch) if args.fresh else lambda: None
        rounds = _alternate(call_old, call_new, before, args)
        label = cell.label.removesuffix(", forward")
        old_ms, new_ms = rounds.min(0).tolist()
        ratio = float(np.median(rounds[:, 0] / rounds[:, 1]))
        times = {"old_ms": old_ms, "new_ms": new_ms, "ratio": round(ratio, 4), "rounds": len(rounds)}
        found.append({"family": cell.family, "label": label, "product": name, **times})
    return found


def _apart(old, new) -> float:
    a, b = np.asarray(old), np.asarray(new)
    return float(np.abs(a - b).max(initial=0) / np.abs(a).max(initial=1e-30))


def _products(kernels: direct.Kernels, problem: Problem, torch) -> dict[str, tuple[Callable, list]]:
    """For each product of a workload: what computes it, and the arrays it writes."""
    as_tensor = torch.from_numpy if torch else (lambda a: a)
    x, dy, w = (as_tensor(a) for a in (problem.x, problem.dy, problem.values))
    y, dx, dw = (as_tensor(np.zeros(a.shape, np.float32)) for a in (problem.dy, problem.x, problem.values))
    if problem.num_blocks:
        return {
            "y": (lambda: kernels.block_diag_matmul(x, w, None, y, False), [y]),
            "dx": (lambda: kernels.block_diag_matmul(dy, w, None, dx, True), [dx]),
            "dW": (lambda: kernels.block_diag_outer(x, dy, dw), [dw]),
        }
    pattern = problem.pattern
    index = [as_tensor(np.array(a)) for a in pattern.index]
    sizes = (*pattern.shape, *pattern.block)
    products = {"y": (lambda: kernels.spmm(x, w, (*index[:2], None), None, y, sizes, False), [y])}
    products["dx"] = (lambda: kernels.spmm(dy, w, index[2:], None, dx, sizes, True), [dx])
    if pattern.is_unstructured:
        return products | {
            "dx, dW": (lambda: kernels.spmm_backward(x, dy, w, index, dx, dw, None, sizes, False), [dx, dw])
        }
    return products | {"dW": (lambda: kernels.sddmm(x, dy, index[:2], dw, sizes), [dw])}


def _writer(problem: Problem, torch) -> Callable[[], None]:
    """What writes the inputs anew, the same numbers."""
    pairs = [(a, a.copy()) for a in (problem.x, problem.dy)]
    if torch:
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in pairs]

    def write() -> None:
        for to, a in pairs:
            torch.add(a, 0, out=to) if torch else np.copyto(to, a)

    return write


def _alternate(old: Callable, new: Callable, before: Callable[[], None], args) -> np.ndarray:
    """Milliseconds of (old, new), a row a round; who goes first changes."""
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rounds, stop = [], time.perf_counter() + args.seconds
    while len(rounds) < 6 or time.perf_counter() < stop:
        pair = [0.0, 0.0]
        for which in (0, 1) if len(rounds) % 2 else (1, 0):
            before()
            start = clock()
            (old, new)[which]()
            pair[which] = max(1e-6, 1e3 * (clock() - start))
        rounds.append(pair)
    return np.array(rounds).round(6)


def _table(family: str, cells: list[dict]) -> str:
    cells = [cell for cell in cells if cell["family"] == family]
    rows = [[f"== {family}", "product", "old ms", "new ms", "old / new"]]
    for cell in cells:
        old, new = (f"{cell[name]:.4g}" for name in ("old_ms", "new_ms"))
        rows.append([cell["label"], cell["product"], old, new, f"{cell['ratio']:.2f}x"])
    mean = math.exp(float(np.mean([math.log(cell["ratio"]) for cell in cells])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"geometric mean {mean:.2f}x; ms are minima"])


def _machine(library: ctypes.CDLL, args) -> dict:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": library.jaxsparse_cpu_isa().decode(),
        "threads": args.threads,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": " ".join(["python", "benchmarks/builds.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
