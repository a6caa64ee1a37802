"""The cells that the cost model is fitted on and judged by: python benchmarks/costs.py.

For each shape, number of rows and mode, all formats take turns in one process, in JAX and in PyTorch apart. The time of
a format is that which a twentieth of its calls are faster than. `gradients` is forward and backward pass. The machine's
profile (jaxsparse/costs/machine.py) is measured before and after, and the better of the two rates is kept.

`--one-core` runs on one core and one thread, and reads the clock of the processor time that this process took: what
other processes do to it is then little. The number is that of the core.

With AVX2 on a machine that has AVX-512:

    JAXSPARSE_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
      XLA_FLAGS=--xla_cpu_max_isa=AVX2 python benchmarks/costs.py --out benchmarks/results/costs_avx2.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _measure
from jaxsparse.costs import layers, machine, racing
from jaxsparse.costs.layers import Layer

PACKAGES = ("jax", "jaxlib", "torch", "numpy")
ROWS = {(128, 128): (1, 8, 64, 256, 2048), (512, 512): (1, 8, 64, 256, 2048), (768, 3072): (1, 8, 64, 256, 1024)}
ROWS[2048, 2048] = (1, 8, 64, 256)
BLOCKS = {8: (0.1, 0.3), 16: (0.1, 0.4), 32: (0.1, 0.3, 0.6), 128: (0.1, 0.4)}
ENTRIES = (0.02, 0.1, 0.25, 0.5)
MODES = ("forward", "gradients")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one tiny shape, to see that it runs")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each shape, number of rows and mode")
    parser.add_argument("--out", default="benchmarks/results/costs.json")
    parser.add_argument("--one-core", type=int, help="run on this core alone, by processor time")
    args = parser.parse_args()
    clock = time.perf_counter if args.one_core is None else time.process_time
    if args.one_core is not None:
        os.sched_setaffinity(0, {args.one_core})
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {"machine": _measure.machine(PACKAGES), "clock": clock.__name__, "profiles": {}, "cells": []}
    for framework, home in machine.FRAMEWORKS.items():
        side, before = importlib.import_module(home), machine.measure(framework, clock, math.inf)
        for shape, batch, dtype in _places(args.quick):
            start = time.perf_counter()
            run["cells"] += _cells(framework, side, _formats(shape, batch, dtype), args.seconds, clock)
            print(framework, shape, batch, dtype, f"{time.perf_counter() - start:.0f} s", flush=True)
            out.write_text(json.dumps(run, indent=None).replace('{"framework"', '\n{"framework"') + "\n")
        run["profiles"][framework] = dataclasses.asdict(_better(before, machine.measure(framework, clock, math.inf)))
    run["machine"]["load_after"] = os.getloadavg()
    out.write_text(json.dumps(run, indent=None).replace('{"framework"', '\n{"framework"') + "\n")
    print(f"numbers: {out}")


def _places(quick: bool) -> Iterator[tuple[tuple[int, int], int, str]]:
    """(shape, rows, dtype)."""
    if quick:
        yield (64, 64), 8, "float32"
        return
    for shape, rows in ROWS.items():
        for batch in rows:
            yield shape, batch, "float32"
    for dtype in ("bfloat16", "float16", "float64"):
        for shape, batch in (((512, 512), 8), ((768, 3072), 256)):
            yield shape, batch, dtype


def _formats(shape: tuple[int, int], batch: int, dtype: str) -> list[Layer]:
    found = [layers.dense(shape, batch, dtype)]
    found += [layers.block_diag(shape, batch, 1 / n, dtype) for n in (2, 8)]
    for b, densities in BLOCKS.items():
        if b < min(shape):
            found += [layers.block_sparse(shape, batch, density, b, dtype) for density in densities]
    return found + [layers.sparse(shape, batch, density, dtype) for density in ENTRIES]


def _cells(framework: str, side, formats: list[Layer], seconds: float, clock) -> list[dict]:
    cells = []
    with side.wide(formats[0].dtype):
        made = [side.steps(layer, MODES) for layer in formats]
        for mode, functions in zip(MODES, zip(*made, strict=True), strict=True):
            with _measure.Load() as load:
                turns = racing.take_turns(functions, seconds, clock)
            for layer, calls in zip(formats, zip(*turns, strict=True), strict=True):
                times = sorted(t for turn in calls for t in turn)
                cells.append(
                    {
                        "framework": framework,
                        "mode": mode,
                        "layer": dataclasses.asdict(layer),
                        "ms": float(f"{1e3 * times[len(times) // 20]:.4g}"),
                        "median_ms": float(f"{1e3 * times[len(times) // 2]:.4g}"),
                        "load_of_others": load.of_others,
                    }
                )
    return cells


def _better(a: machine.Profile, b: machine.Profile) -> machine.Profile:
    """Of two profiles of a machine the higher rates, and the quicker calls: others only ever took time away."""
    return dataclasses.replace(
        a,
        rates={dtype: max(rate, b.rates[dtype]) for dtype, rate in a.rates.items()},
        kernels={name: max(rate, b.kernels[name]) for name, rate in a.kernels.items()},
        memory={size: max(rate, b.memory[size]) for size, rate in a.memory.items()},
        calls={mode: min(seconds, b.calls[mode]) for mode, seconds in a.calls.items()},
    )


if __name__ == "__main__":
    main()
