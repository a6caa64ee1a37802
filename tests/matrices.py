"""The matrices that the products on torch's tensors are tested with, each beside its dense form."""

import numpy as np
import torch

from jaxsparse.formats import BlockPattern
from torch_bridge._matrix import Diagonal, Sparse


def pattern_of(shape, block, density=0.4):
    rng = np.random.default_rng(0)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    cols, rows = np.nonzero(rng.random(grid[::-1]) < density)
    return BlockPattern.from_indices(rows, cols, shape=shape, block=block)


def sparse(shape, block):
    pattern = pattern_of(shape, block)
    index = tuple(torch.from_numpy(np.array(a)) for a in pattern.index)
    edge = pattern.edge_mask()
    inside = torch.ones(pattern.values_shape) if edge is None else torch.from_numpy(np.array(edge)).float()
    rows, cols = (torch.from_numpy(np.array(a)).long() for a in (pattern.rows, pattern.cols))

    def dense(w):
        (i, o), grid = block, pattern.grid
        full = w.new_zeros(grid[0], grid[1], i, o).index_put((rows, cols), w.reshape(-1, i, o))
        return full.transpose(1, 2).reshape(grid[0] * i, grid[1] * o)[: shape[0], : shape[1]]

    return Sparse(index, (*shape, *block)), inside, dense


def diagonal(n, i, o):
    return Diagonal((n, i, o)), torch.ones(n, i, o), lambda w: torch.block_diag(*w)


MATRICES = {
    "single entries": lambda: sparse((10, 7), (1, 1)),
    "blocks": lambda: sparse((12, 8), (4, 2)),
    "ragged blocks": lambda: sparse((10, 7), (4, 3)),
    "block-diagonal": lambda: diagonal(3, 4, 2),
}


def problem(make, transposed, dtype=torch.float64, batch=(3, 2)):
    """(matrix, its dense form as a function of the values, x, w, bias, dy)."""
    torch.manual_seed(0)
    matrix, inside, dense = make()
    w = (torch.randn(inside.shape, dtype=dtype) * inside.to(dtype)).requires_grad_()
    size_in, out = dense(w).shape[:: -1 if transposed else 1]
    x, bias, dy = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((*batch, size_in), (out,), (*batch, out)))
    if transposed:
        return matrix.T, lambda w: dense(w).T, x, w, bias, dy
    return matrix, dense, x, w, bias, dy
