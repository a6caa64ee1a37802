"""What makes five index arrays one whole pattern: the check, and the two arrays that the rest follows from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NAMES = ("col_ptr", "row_index", "row_ptr", "col_index", "order")
RUN = 2**15  # entries that are looked at together: what is computed from them stays in the cache
SAMPLE = 2**7  # entries at the end, where numbers are large and averages lose most


class Record(NamedTuple):
    """A pattern in host memory, as small as it gets. Never written to."""

    col_ptr: np.ndarray
    row_index: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], grid: tuple[int, int]) -> Record:
        """The record of a pattern's arrays, of which only the first two are read."""
        return cls(_smallest(arrays[0], arrays[1].size), _smallest(arrays[1], grid[0]))

    def whole(self, grid: tuple[int, int]) -> list[np.ndarray] | None:
        """All five arrays, on a grid of (rows, columns), or None if this is no pattern on it."""
        col_ptr, row_index = (a.astype(np.int64) for a in self)
        if (
            _wrong_ends("", col_ptr, row_index.size)
            or _falling_pointers("", col_ptr)
            or _out_of_range("", row_index, 0, grid[0])
        ):
            return None
        order = np.argsort(self.row_index, kind="stable")
        cols = np.repeat(np.arange(grid[1]), np.diff(col_ptr))
        row_ptr = np.append(0, np.cumsum(np.bincount(row_index, minlength=grid[0])))
        arrays = [a.astype(np.int32) for a in (col_ptr, row_index, row_ptr, cols[order], order)]
        return None if fault(arrays, grid) else arrays


def fault(arrays: Sequence[np.ndarray], grid: tuple[int, int], sample: bool = False) -> str | None:
    """What keeps five index arrays from being one whole pattern, or None.

    The pointers rise from 0 to the number of entries; indices are in range and ascend within their line; `order` takes
    each entry of the view by rows to the same place of the view by columns, and so is a permutation. O(nnzb), no sort.

    Args:
      grid: (rows, columns), in blocks.
      sample: look at the ends only, of pointers and entries, where averages leave their marks.
    """
    arrays = list(arrays)
    for k, (name, a) in enumerate(zip(NAMES, arrays, strict=True)):
        if a.dtype.kind not in "iuf":
            return f"{name} is {a.dtype}, and must be integers"
        if a.dtype.kind == "f":
            arrays[k] = a.astype(np.int64)
            if (arrays[k] != a).any():
                return f"{name} has {a[arrays[k] != a][0]:.6g} among its integers"
    col_ptr, _, row_ptr, _, order = arrays
    for name, ptr in (("col_ptr", col_ptr), ("row_ptr", row_ptr)):
        wrong = _wrong_ends(name, ptr, order.size) or (None if sample else _falling_pointers(name, ptr))
        if wrong:
            return wrong
    first = max(order.size - SAMPLE, 0) if sample else 0
    for start in range(first, order.size, RUN):
        stop = min(start + RUN, order.size)
        wrong = _wrong_order(arrays, grid, start, stop) or (None if sample else _falling(arrays, start, stop))
        if wrong:
            return wrong
    return None


def _wrong_ends(name: str, ptr: np.ndarray, count: int) -> str | None:
    if ptr[0] == 0 and ptr[-1] == count:
        return None
    return f"{name} goes from {ptr[0]} to {ptr[-1]}, and must go from 0 to {count}, the number of entries"


def _falling_pointers(name: str, ptr: np.ndarray) -> str | None:
    falls = ptr[1:] < ptr[:-1]
    if falls.any():
        k = int(np.argmax(falls))
        return f"{name} falls from {ptr[k]} to {ptr[k + 1]} at {k + 1}"
    return None


def _out_of_range(name: str, part: np.ndarray, start: int, bound: int) -> str | None:
    if not part.size or (part.min() >= 0 and part.max() < bound):
        return None
    k = int(np.argmax((part < 0) | (part >= bound)))
    return f"{name} has {part[k]} at {start + k}, outside 0 to {bound - 1}"


def _falling(arrays: Sequence[np.ndarray], start: int, stop: int) -> str | None:
    """Where indices do not ascend, other than at the beginning of a line."""
    col_ptr, row_index, row_ptr, col_index, _ = arrays
    for name, index, ptr in (("row_index", row_index, col_ptr), ("col_index", col_index, row_ptr)):
        part = index[max(start - 1, 0) : stop]
        falls = np.flatnonzero(part[1:] <= part[:-1]) + max(start, 1)
        at = np.searchsorted(ptr, falls.astype(ptr.dtype))  # of one dtype: it would copy all pointers
        wrong = falls[ptr[at] != falls]
        if wrong.size:
            k = int(wrong[0])
            return f"{name} has {index[k - 1]} and then {index[k]} in one line, at {k - 1} and {k}"
    return None


def _wrong_order(arrays: Sequence[np.ndarray], grid: tuple[int, int], start: int, stop: int) -> str | None:
    """Where the views disagree: entry k of the view by rows, in its row and column, is stored at order[k]."""
    col_ptr, row_index, row_ptr, col_index, order = arrays
    cols, at = col_index[start:stop], order[start:stop]
    wrong = (
        _out_of_range("row_index", row_index[start:stop], start, grid[0])
        or _out_of_range("col_index", cols, start, grid[1])
        or _out_of_range("order", at, start, order.size)
    )
    first, last = np.searchsorted(row_ptr, np.array((start, stop - 1), row_ptr.dtype), side="right") - 1
    counts = np.diff(np.clip(row_ptr[first : last + 2], start, stop))
    if wrong or counts.sum() != stop - start or counts.min() < 0:
        return wrong or f"row_ptr falls between {first} and {last + 1}"
    rows = np.repeat(np.arange(first, last + 1), counts)
    wrong = row_index.take(at, mode="clip") != rows
    wrong |= (col_ptr.take(cols, mode="clip") > at) | (col_ptr[1:].take(cols, mode="clip") <= at)
    if not wrong.any():
        return None
    k = int(np.argmax(wrong))
    col = int(np.searchsorted(col_ptr, at[k], side="right")) - 1
    return (
        f"by rows, entry {start + k} is ({rows[k]}, {cols[k]}), but order has it at {at[k]}, where "
        f"({row_index[at[k]]}, {col}) is stored"
    )


def _smallest(a: np.ndarray, top: int) -> np.ndarray:
    """A read-only copy in the smallest unsigned integers that go up to `top`."""
    small = a.astype(np.min_scalar_type(top))
    small.flags.writeable = False
    return small
