"""Patterns of random or of given places, and what lies beyond a matrix's edge: what a new layer needs, without JAX."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_index(grid: tuple[int, int], count: int) -> tuple[Tensor, ...]:
    """The five int32 arrays of a pattern of `count` entries, as `BlockPattern.random` draws them.

    Every place is equally likely, and columns are equal to within one. A column of k entries draws one row from each
    of k strata, which are equal to within one row, and a random amount of its own rotates what it drew; another rotates
    the columns, of which the first would have one entry more. NumPy computes all but the random numbers: of torch's
    operators each would wait for all of its threads.
    """
    rows, cols = grid
    per, extra = divmod(count, cols)
    per_column = per + ((np.arange(cols) + _below(np.array(cols))) % cols < extra)
    col_ptr = _pointers(per_column)
    k, column = (np.repeat(a, per_column) for a in (per_column, np.arange(cols)))
    first = col_ptr[column]
    slot = np.arange(count) - first
    low, high = (s * rows // k for s in (slot, slot + 1))
    drawn = low + _below(high - low)
    row = (drawn + _below(np.full(cols, rows))[column]) % rows
    past = np.bincount(column[row < drawn], minlength=cols)  # went past the end, and stand first in their column
    return index_of(row[first + (slot - past[column]) % k], column, grid)


def index_of(row: np.ndarray, column: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """The five int32 arrays of a pattern whose entries are sorted by column, then row."""
    order = np.argsort(row.astype(np.min_scalar_type(grid[0])), kind="stable")  # of 16 bits it is linear
    by_column, by_row = (_pointers(np.bincount(a, minlength=n)) for a, n in ((column, grid[1]), (row, grid[0])))
    return tuple([torch.from_numpy(a.astype(np.int32)) for a in (by_column, row, by_row, column[order], order)])


def inside(index: tuple[Tensor, ...], shape: tuple[int, int], block: tuple[int, int]) -> Tensor | None:
    """Which entries of [nnzb, i, o] values lie inside the stored matrix; None where all do."""
    if shape[0] % block[0] == 0 and shape[1] % block[1] == 0:
        return None
    col_ptr, rows = index[0], index[1].long()
    cols = torch.arange(len(col_ptr) - 1, device=rows.device).repeat_interleave(col_ptr.long().diff())
    within = (
        n[:, None] * b + torch.arange(b, device=n.device) < size
        for n, b, size in zip((rows, cols), block, shape, strict=True)
    )
    in_rows, in_cols = within
    return in_rows[:, :, None] & in_cols[:, None, :]


def _pointers(counts: np.ndarray) -> np.ndarray:
    return np.append(0, np.cumsum(counts))


def _below(bounds: np.ndarray) -> np.ndarray:
    """Random integers from 0 up to each bound, which is left out."""
    drawn = torch.rand(bounds.shape, dtype=torch.float64, device="cpu")  # whatever the default device is
    return (drawn.numpy() * bounds).astype(np.int64)
