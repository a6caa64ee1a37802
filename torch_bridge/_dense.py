"""Between dense torch matrices (in, out) and the stored blocks of a sparse layer: copies, exact in every dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxsparse.formats import BlockPattern


def gather(w: Tensor, pattern: BlockPattern) -> Tensor:
    """The stored blocks of a dense matrix, zero beyond its edge."""
    if pattern.transposed:
        return gather(w.T, pattern.T)
    (i, o), (rows, cols) = pattern.block, pattern.grid
    w = F.pad(w, (0, cols * o - w.shape[1], 0, rows * i - w.shape[0])).reshape(rows, i, cols, o)
    row, col = _places(pattern, w.device)
    return w[row, :, col].reshape(pattern.values_shape)


def scatter(values: Tensor, pattern: BlockPattern) -> Tensor:
    """The dense matrix, zeros where nothing is stored: the inverse of `gather`."""
    if pattern.transposed:
        return scatter(values, pattern.T).T
    (i, o), (rows, cols) = pattern.block, pattern.grid
    w = values.new_zeros(rows, i, cols, o)
    row, col = _places(pattern, w.device)
    w[row, :, col] = values.reshape(-1, i, o)
    return w.reshape(rows * i, cols * o)[: pattern.shape[0], : pattern.shape[1]]


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


def _places(pattern: BlockPattern, device: torch.device) -> list[Tensor]:
    """Block row and block column of every stored block."""
    return [torch.tensor(np.asarray(index), dtype=torch.int64, device=device) for index in (pattern.rows, pattern.cols)]
