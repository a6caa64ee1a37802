"""Runs a grid: in each cell the contenders take turns, and every result is checked before it is timed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.bench.grid import Cell, Problem
from jaxsparse.costs._in_jax import wide
from jaxsparse.costs.racing import take_turns

DENSE = ("JAX dense", "torch dense")
_ALLOWED = {"float64": 1e-12, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # relative to the largest number
_PAUSE = 0.003  # seconds: idle threads of torch (OpenMP) and of XLA spin for less than that, then sleep
_FRAMEWORKS = {"jax": "in_jax", "torch": "in_torch"}


class Result(NamedTuple):
    """A contender's milliseconds a call: the median of its turns, and their quartiles; or why there are none."""

    ms: float | None = None
    low: float | None = None
    high: float | None = None
    turns: int = 0
    note: str = ""


class Measured(NamedTuple):
    """One cell, and its results by contender."""

    cell: Cell
    results: dict[str, Result]

    @property
    def dense(self) -> float | None:
        """Milliseconds of the faster dense product."""
        return min((r.ms for name, r in self.results.items() if name in DENSE and r.ms), default=None)

    def speed(self, name: str) -> float | None:
        """How many times as fast as the faster dense product."""
        result = self.results.get(name)
        return self.dense / result.ms if result and result.ms and self.dense else None

    def as_dict(self) -> dict[str, Any]:
        results = {name: {**r._asdict(), "speed": self.speed(name)} for name, r in self.results.items()}
        return {**self.cell._asdict(), "results": results}


def frameworks() -> dict[str, str]:
    """Those that can compete, and the modules of this package that know them."""
    found = dict(_FRAMEWORKS)
    if not importlib.util.find_spec("torch") or _contenders_in("torch").why_not():
        del found["torch"]
    return found


def run(
    grid: Sequence[Cell], seconds: float, only: str = "", tell: Callable[[str], None] = lambda text: None
) -> Iterator[Measured]:
    """The results, cell by cell.

    Args:
      seconds: for the turns of a cell, unless the least number of turns needs more.
      only: a regular expression: contenders whose name does not hold it are left out.
      tell: is told what is being done.
    """
    for cell in grid:
        with wide(cell.dtype):
            measured = _measured(cell, seconds, only, tell)
        yield measured


def _measured(cell: Cell, seconds: float, only: str, tell: Callable[[str], None]) -> Measured:
    problem, calls, notes = Problem(cell), {}, {}
    for framework in frameworks():
        for name, build in _contenders_in(framework).builders(cell, problem).items():
            if re.search(only, name):
                tell(name)
                call = _made(build, problem, cell)
                (notes if isinstance(call, str) else calls)[name] = call
    tell("taking turns")
    turns = take_turns(list(calls.values()), seconds, pause=_PAUSE) if calls else []
    timed = {name: _result([turn[k] for turn in turns]) for k, name in enumerate(calls)}
    return Measured(cell, {**timed, **{name: Result(note=note) for name, note in notes.items()}})


def save(path: Path, measured: Sequence[Measured], about: Mapping[str, Any]) -> None:
    """Writes what there is, in the place of what was written before, at one stroke."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(as_dict(measured, about), indent=1) + "\n")
    os.replace(partial, path)


def as_dict(measured: Sequence[Measured], about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about, "cells": [m.as_dict() for m in measured]}


def _contenders_in(framework: str) -> Any:
    return importlib.import_module(f"jaxsparse.bench.{_FRAMEWORKS[framework]}")


def _made(build: Callable[[], Any], problem: Problem, cell: Cell) -> Any:
    """A call that gives the right result, or why there is none."""
    try:
        call = build()
        y = call()
        got = np.asarray(y.double().cpu() if hasattr(y, "cpu") else y).astype(np.float64)[: len(problem.first_rows)]
    except Exception as error:  # whatever a library says of what it can't do
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    want = problem.first_rows
    wrong = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    return call if wrong <= _ALLOWED[cell.dtype] else f"a wrong result, relative error {wrong:.1e}"


def _result(turns: Sequence[Sequence[float]]) -> Result:
    """Of a turn the slowest of the quickest quarter of its calls: other processes only ever add time."""
    typical = [1e3 * sorted(calls)[len(calls) // 4] for calls in turns]
    low, median, high = statistics.quantiles(typical, n=4) if len(typical) > 1 else typical * 3
    return Result(median, low, high, len(typical))
