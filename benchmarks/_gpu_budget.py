"""What the two calls of `gpu.py` are expected to take on an H100 with 16 cores, held against their limit by --dry-run.

Nothing here was timed on a GPU. Programs are counted in the steps themselves. The processor time of compiling one is
what `_gpu_costs.py` measured on 2 cores of an AVX-512 machine (JAX 0.12.0.1, without the tuning of products that XLA
does on a GPU). What runs is counted by the rounds of `median_ms`, at the predicted limit of the slowest contender.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import _gpu_cells, _gpu_limits
from benchmarks._gpu_checks import BESIDE, backends_here
from benchmarks._gpu_run import Step

LIMIT = 360.0  # seconds a call may take
CORES = 16
START = 30.0  # imports, the first program, what is moved to the machine: an allowance
KERNELS = {"forward": 1, "dX": 1, "dW": 1, "step": 3}
SECONDS = {"mosaic": 1.3, "triton": 0.5, "other": 0.6}  # of processor time to compile one product of a program
CHECK = 5  # products of a check: y with gelu and without, and the gradients
SMALL = 0.2  # seconds of processor time of a small program: that fills memory with NaN, or compares two results
ORACLE = 1.1  # seconds of processor time of what a check is compared with, all of it beside other steps
COMPARE = 0.2  # seconds of the comparison
ROUND = 0.02 * 10  # seconds of a contender: nine rounds and the runs before them
COUNTERS = 30.0  # seconds of a profiled run, in a process of its own: an allowance, two of them a call


class Cost(NamedTuple):
    """Programs to compile, the seconds that takes on all cores, and those of what runs."""

    programs: int
    compiling: float
    running: float

    @property
    def seconds(self) -> float:
        """Of the call: what runs waits for what is compiled only at first, so this is too much."""
        return START + self.compiling + self.running


def of_call(steps: Iterable[Step]) -> Cost:
    """The cost of the steps of one call, by their names; to be called as `checks.as_on_an_h100`."""
    cells = {f"time {cell.name}": cell for cell in _gpu_cells.grid(toy=False)}
    costs = [_of_cell(cells[step.name]) if step.name in cells else _of_other(step.name) for step in steps]
    programs, compiling, running = (sum(column) for column in zip(*costs, strict=True))
    return Cost(int(programs), compiling / CORES, running)


def _of_cell(cell: _gpu_cells.Cell) -> Cost:
    ours = backends_here(False, cell.dtype, cell.block)
    others = {"blocks": 3, "block-diagonal": 4, "unstructured": 3}[cell.family]  # as in `_gpu_cells.contenders`
    twice = ["triton"] * (cell.layers > 1)
    if cell.family == "blocks" and "mosaic" in ours:
        twice += ["mosaic"] * (2 if _gpu_cells.shares_x(cell) else 1)
    seconds = sum(SECONDS[name] for name in ours + twice) + SECONDS["other"] * others
    torch = {"blocks": 1, "block-diagonal": 3, "unstructured": 0}[cell.family]
    slowest = 1e-3 * max(_gpu_limits.predicted_ms(cell).values()) * cell.layers
    contenders = len(ours) + len(twice) + others
    return Cost(contenders + 1, seconds * KERNELS[cell.mode] + SMALL, (contenders + torch) * max(ROUND, 12 * slowest))


def _of_other(name: str) -> Cost:
    kind, *words = name.split()
    if kind == "check":
        return Cost(2, CHECK * SECONDS[words[0]] + SMALL + ORACLE, COMPARE)
    if kind == "tune":
        entries = words[0] == "entries"
        programs = 4 if entries else 9
        return Cost(programs, programs * SECONDS["triton" if entries else "mosaic"], programs * ROUND)
    running = {"counters": COUNTERS, "sanitize": BESIDE / 3, "torch": BESIDE / 3}  # the three run side by side
    return Cost(2, 2 * SECONDS["other"], running.get(kind, 2 * ROUND))
