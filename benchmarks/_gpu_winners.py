"""From what `gpu.py` timed to what `backend=None` goes by: who won each workload against XLA.

A back end is in the race only where its checks gave right results: where one failed, or none was made, XLA stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import _gpu_cells
from jaxsparse._measured import Result, Workload
from jaxsparse._sizes import is_unstructured

LARGEST = 128  # side of the blocks that are checked; larger ones are cut into such tiles
MARGIN = 1.03  # times as fast as XLA, below which XLA stays the choice
# Which products a mode times, the one that it times alone first; a step decides where nothing timed a product alone.
_OF_SPARSE = {"forward": ("spmm",), "dW": ("sddmm",), "step": ("spmm_grads", "sddmm", "spmm")}
_OF_DIAGONAL = {"forward": ("block_diag_matmul",), "dW": ("block_diag_outer",), "step": ("block_diag_outer",)}


def winners(steps: Mapping[str, Any], run: str) -> list[Result]:
    """The results of all cells that were timed; `run` says when, with what, by which command."""
    found: dict[Workload, Result] = {}
    right = _right(steps)
    for mode in ("forward", "dW", "step"):
        for cell in _gpu_cells.grid(toy=False):
            ms = steps.get(f"time {cell.name}", {}).get("ms", {})
            if cell.mode == mode and "ours (xla)" in ms:
                size = min(max(cell.block), LARGEST)
                checked = {"xla", *(name for name in right if right[name].get((size, cell.dtype)))}
                for result in _results(
                    cell, {name: ms[f"ours ({name})"] for name in checked if f"ours ({name})" in ms}, run
                ):
                    found.setdefault(result.workload, result)
    return list(found.values())


def _right(steps: Mapping[str, Any]) -> dict[str, dict[tuple[int, str], bool]]:
    """Back end to (side of its blocks, dtype) to whether each check of such blocks gave right results."""
    right: dict[str, dict[tuple[int, str], bool]] = {"mosaic": {}, "triton": {}}
    for name, result in steps.items():
        if match := re.fullmatch(r"check (mosaic|triton) block (\d+) .*?(\w+) batch \d+", name):
            of, key = right[match[1]], (int(match[2]), match[3])
            of[key] = of.get(key, True) and "error" not in result
    return right


def _results(cell: _gpu_cells.Cell, ours: Mapping[str, float], run: str) -> Iterator[Result]:
    best = min(ours, key=ours.__getitem__)
    times_as_fast = ours["xla"] / ours[best]
    if times_as_fast < MARGIN:
        best, times_as_fast = "xla", 1.0
    ops = _OF_DIAGONAL if cell.family == "block-diagonal" else _OF_SPARSE
    for op in ops[cell.mode]:
        if op != "spmm_grads" or is_unstructured(cell.block):
            work = Workload(op, cell.dtype, cell.block, cell.batch, cell.density)
            yield Result(work, best, round(times_as_fast, 3), run)
