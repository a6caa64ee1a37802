"""The products by torch's own operators alone, for programs that run without this library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_bridge._matrix import ACTIVATIONS, Diagonal, Matrix, Sparse


def multiply(matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x W + bias). A sparse W is expanded first, which whoever runs the program may do once."""
    if isinstance(matrix, Diagonal):
        y = _by_block(matrix, x, w)
        y = y if bias is None else y + bias
    else:
        y = F.linear(x, dense(matrix, w), bias)
    return ACTIVATIONS[activation](y) if activation else y


def dense(matrix: Sparse, values: Tensor) -> Tensor:
    """The matrix as torch has weights, (out, in); the sizes in the graph depend on no tensor's content."""
    size_in, out, i, o = matrix.sizes
    rows, cols = -(-size_in // i), -(-out // o)
    _, row_index, _, col_index, order = (t.long() for t in matrix.index)
    at = col_index * rows + row_index[order]  # the entries by row: their columns stand in the index
    w = values.new_zeros(cols * rows, i, o).index_put((at,), values.reshape(-1, i, o)[order])
    w = w.reshape(cols, rows, i, o).permute(0, 3, 1, 2).reshape(cols * o, rows * i)[:out, :size_in]
    return w.T if matrix.transposed else w


def _by_block(matrix: Diagonal, x: Tensor, w: Tensor) -> Tensor:
    n, i, _ = matrix.sizes[:1] + matrix.sizes[1:][:: -1 if matrix.transposed else 1]
    y = torch.bmm(x.reshape(-1, n, i).transpose(0, 1), w.mT if matrix.transposed else w)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)
