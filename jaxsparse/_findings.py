"""What can be said of the matrices of a checkpoint: how full their lines are, and what moved between two of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxsparse._matrices import Matrix
from jaxsparse._norms import relative_error
from jaxsparse.formats import BlockPattern


class Degrees(NamedTuple):
    """How many blocks or entries the lines along one axis store: numbers of them, and the histogram.

    Attributes:
      empty: lines without any.
      edges, counts: `counts[k]` lines store from edges[k] up to, not including, edges[k + 1].
    """

    empty: int
    least: int
    median: float
    most: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


class Moved(NamedTuple):
    """The difference of a matrix between two checkpoints.

    Attributes:
      kept, gone, grown: blocks or entries of both, of the first alone, of the second alone; None where one of the two
        has no pattern, or another shape or block.
      change: the L2 norm of the change of what both have, relative to the first; None where it can't be taken.
      note: why the two can't be compared, or "".
    """

    kept: int | None = None
    gone: int | None = None
    grown: int | None = None
    change: float | None = None
    note: str = ""

    @property
    def is_change(self) -> bool:
        return bool(self.note or self.gone or self.grown or self.change)


def degrees(pattern: BlockPattern) -> dict[str, Degrees]:
    """Of the blocks: those that feed each output column, and those that each input row feeds."""
    by_col, by_row = (np.diff(np.asarray(ptr)) for ptr in (pattern.col_ptr, pattern.row_ptr))
    if pattern.transposed:
        by_col, by_row = by_row, by_col
    return {"inputs": _degrees(by_row), "outputs": _degrees(by_col)}


def difference(before: Matrix, after: Matrix) -> Moved:
    """What moved from one checkpoint to another."""
    if before.shape != after.shape:
        return Moved(note="{}x{} became {}x{}".format(*before.shape, *after.shape))
    a, b = before.pattern, after.pattern
    if a is None and b is None:
        return Moved(change=_change(before.values, after.values))
    if a is None or b is None:
        return Moved(note=f"density {before.density:.3g} became {after.density:.3g}")
    if a.block != b.block:
        return Moved(note="blocks of {}x{} became {}x{}".format(*a.block, *b.block))
    _, here, there = np.intersect1d(*(places(p) for p in (a, b)), assume_unique=True, return_indices=True)
    values = [None if m.values is None else m.values[at] for m, at in ((before, here), (after, there))]
    return Moved(len(here), a.nnzb - len(here), b.nnzb - len(here), _change(*values))


def places(pattern: BlockPattern) -> np.ndarray:
    """A number for the place of every block, in the order of the values."""
    return np.asarray(pattern.rows, np.int64) * pattern.grid[1] + np.asarray(pattern.cols)


def as_dict(path: str, matrix: Matrix) -> dict[str, Any]:
    """One matrix, for JSON."""
    p = matrix.pattern
    about = {"path": path, "stored": matrix.stored, "shape": list(matrix.shape), "density": matrix.density}
    about["block"] = list(p.block) if p else None
    about["dtype"] = None if matrix.values is None else str(matrix.values.dtype)
    if p:
        about["nnzb"] = p.nnzb
        about["degrees"] = {axis: d._asdict() for axis, d in degrees(p).items()}
    return about


def _degrees(counts: np.ndarray) -> Degrees:
    least, most = int(counts.min()), int(counts.max())
    step = max(1, -(-(most - least + 1) // 24))
    edges = np.arange(least, most + step + 1, step)
    lines, _ = np.histogram(counts, edges)
    shape = tuple(edges.tolist()), tuple(lines.tolist())
    return Degrees(int((counts == 0).sum()), least, float(np.median(counts)), most, *shape)


def _change(before: np.ndarray | None, after: np.ndarray | None) -> float | None:
    if before is None or after is None or before.shape != after.shape:
        return None
    return relative_error(before, after)
