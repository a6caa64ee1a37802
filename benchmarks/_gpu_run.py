"""How the steps of `gpu.py` are built and run: programs compiled ahead, commands beside, times in turns."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]


class Step(NamedTuple):
    """A piece of the work.

    Attributes:
      name: its kind, and what it is about.
      build: what may run beside other steps: compiles, and gives what runs on the GPU alone.
      seconds: more than what was built takes; after that, a kernel waits for ever.
    """

    name: str
    build: Callable[[], Callable[[], Result]]
    seconds: float = 60


class Program:
    """A function of arrays, compiled for them, inside a context, before it is run."""

    def __init__(self, function: Callable, *operands, within: Callable = contextlib.nullcontext):
        self.function, self.operands, self.within = function, operands, within

    def compile(self) -> None:
        with self.within():
            lowered = jax.jit(self.function).lower(*self.operands)
            self.results, self.compiled = lowered.out_info, lowered.compile()

    def __call__(self):
        """Starts one run."""
        return self.compiled(*self.operands)


def said(wrong: Exception) -> str:
    return f"{type(wrong).__name__}: {str(wrong)[:3000]}"


def compiled(programs: Mapping[str, Program]) -> tuple[dict[str, Any], dict[str, str]]:
    """Those that can be compiled, and why others can't."""
    ready, notes = {}, {}
    for name, program in programs.items():
        try:
            program.compile()
            ready[name] = program
        except Exception as refused:
            notes[name] = said(refused)
    return ready, notes


def beside(*command: str, seconds: float = 150, wanted: str = "") -> Callable[[], Result]:
    """Runs a command now, which must print the wanted word; it shares the GPU, so JAX must not take all memory there.
    Tests compile as users do."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return lambda: {"error": f"took longer than {seconds:g} s"}
    said = (done.stdout + done.stderr)[-3000:]
    return lambda: {"ok" if done.returncode == 0 and wanted in said else "error": said}


def median_ms(runs: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """The median of several rounds in turns, each of as many runs as take about 20 ms."""
    repeats = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, min(200, int(20 / max(_once_ms(run, 1), 1e-3))))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_once_ms(run, repeats[name]))
    return {name: float(np.median(ms)) for name, ms in times.items()}


def _once_ms(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    results = [run() for _ in range(repeats)][-1]
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - start) / repeats
