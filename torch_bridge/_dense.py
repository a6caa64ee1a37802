"""Between dense torch matrices (in, out) and the stored blocks of a sparse layer: copies, exact in every dtype."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jaxsparse._sizes import is_unstructured


class Stored(Protocol):
    """What of `_stored.Stored` is read here: where blocks lie."""

    @property
    def index(self) -> tuple[Tensor, ...]: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def block(self) -> tuple[int, int]: ...
    @property
    def transposed(self) -> bool: ...


def gather(w: Tensor, stored: Stored) -> Tensor:
    """The stored blocks of a dense matrix, zero beyond its edge."""
    (i, o), row, col, (rows, cols) = _places(stored, w.device)
    w = w.T if stored.transposed else w
    if is_unstructured((i, o)):
        return w.T.take(col * rows + row)  # a Linear has its weight in this order
    w = F.pad(w, (0, cols * o - w.shape[1], 0, rows * i - w.shape[0])).reshape(rows, i, cols, o)
    return w[row, :, col]


def scatter(values: Tensor, stored: Stored) -> Tensor:
    """The dense matrix, zeros where nothing is stored: the inverse of `gather`."""
    (i, o), row, col, (rows, cols) = _places(stored, values.device)
    w = values.new_zeros(rows, i, cols, o)
    w[row, :, col] = values.reshape(-1, i, o)
    w = w.reshape(rows * i, cols * o)
    return (w.T if stored.transposed else w)[: stored.shape[0], : stored.shape[1]]


def gather_diagonal(w: Tensor, num_blocks: int) -> Tensor:
    """The diagonal blocks [n, i, o] of a dense matrix (n*i, n*o)."""
    i, o = w.shape[0] // num_blocks, w.shape[1] // num_blocks
    return w.reshape(num_blocks, i, num_blocks, o).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def to_numpy(w: Tensor) -> np.ndarray:
    """The same numbers; NumPy has no bfloat16, and float32 holds them all."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return w.to("cpu", wide).numpy()


def lost_scale(before: Tensor, after: Tensor) -> float:
    """|before| / |after|, Frobenius norms: what makes up for the dropped part; 1 where nothing is left."""
    norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (before, after)]
    return norms[0] / norms[1] if norms[1] else 1.0


def _places(stored: Stored, device: torch.device) -> tuple[tuple[int, int], Tensor, Tensor, tuple[int, int]]:
    """The block as it is stored, block row and block column of every one, and how many rows and columns there are."""
    col_ptr, row, row_ptr, *_ = (t.to(device) for t in stored.index)
    col = torch.arange(len(col_ptr) - 1, device=device).repeat_interleave(col_ptr.diff())
    i, o = stored.block[:: -1 if stored.transposed else 1]
    return (i, o), row.long(), col, (len(row_ptr) - 1, len(col_ptr) - 1)
