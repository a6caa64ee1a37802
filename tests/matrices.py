"""The matrices that the products on torch's tensors are tested with, each beside its dense form."""

import numpy as np
import torch
from torch import func

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


# Of a function of x, [rows, in], and w.
TRANSFORMS = {
    "vmap over x": lambda f, x, w: func.vmap(f, (0, None))(x, w),
    "vmap over w": lambda f, x, w: func.vmap(f, (None, 0))(x, torch.stack([w, 2 * w])),
    "vmap over both": lambda f, x, w: (
        func.vmap(f, (1, 2))(torch.stack([x, x + 1], 1), torch.stack([w, 2 * w], -1))
        if w.ndim == 2
        else func.vmap(f)(torch.stack([x, x + 1]), torch.stack([w, 2 * w]))
    ),
    "vmap of vmap": lambda f, x, w: func.vmap(func.vmap(f, (0, None)), (None, 0))(x, torch.stack([w, w + 1])),
    "per-sample gradients": lambda f, x, w: func.vmap(func.grad(lambda w, x: f(x, w).sum()), (None, 0))(w, x),
    "jacrev": lambda f, x, w: func.jacrev(f, 1)(x, w),
    "jacfwd": lambda f, x, w: func.jacfwd(f, 1)(x, w),
    "jvp": lambda f, x, w: func.jvp(f, (x, w), (x + 1, w - 1))[1],
    "hessian": lambda f, x, w: func.hessian(lambda w: f(x, w).sum())(w),
    "reverse over reverse": lambda f, x, w: func.jacrev(func.jacrev(lambda w: f(x, w).sum()))(w),
    "linearize": lambda f, x, w: func.linearize(f, x, w)[1](x + 1, w - 1),
    "forward over forward": lambda f, x, w: func.jacfwd(func.jacfwd(lambda w: f(x, w).sum()))(w),
    "forward under reverse": lambda f, x, w: func.grad(lambda w: func.jvp(f, (x, w), (x + 1, w - 1))[1].square().sum())(
        w
    ),
    "forward under vmap": lambda f, x, w: func.vmap(lambda x: func.jvp(f, (x, w), (x + 1, w - 1))[1])(x),
    "vmap under forward": lambda f, x, w: func.jvp(func.vmap(f, (0, None)), (x, w), (x + 1, w - 1))[1],
    "a pullback that outlived its transform": lambda f, x, w: func.vjp(
        func.vmap(lambda x: func.vjp(f, x, w)[1](torch.ones_like(f(x, w)))[0]), x
    )[1](x - 1)[0],
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
