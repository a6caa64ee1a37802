"""Contenders that run in torch: dense, masked, CSR, BSR, SparseLab, and six ways to a block-diagonal product."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks._problems import RATE, Cell, Problem

Run = Callable[[], Any]
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}  # both in their fused, one-pass form
warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")


def use_all_cores() -> int:
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud, or it warns
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def builders(cell: Cell, problem: Problem) -> dict[str, Callable[[], Run]]:
    """By name, what makes a contender; it raises where the contender can't do the cell."""
    shared = _Shared(cell, problem)
    everyone = {
        "torch dense": lambda: _build(shared, shared.dense, F.linear),
        "torch masked": lambda: _masked(shared),
    }
    if cell.num_blocks:
        return everyone | _block_diagonal(shared)
    if cell.family == "blocks":
        everyone["torch BSR"] = lambda: _bsr(shared)
        if cell.mode == "training":
            product = _Shared(cell, problem, mode="forward")
            everyone["torch dense product"] = lambda: _build(product, product.dense, F.linear)
        return everyone
    return everyone | {"torch CSR": lambda: _csr(shared), "SparseLab": lambda: _sparselab(shared)}


def _block_diagonal(shared):
    return {
        "torch loop of Linear": lambda: _build(shared, shared.listed, _loop),
        "torch block_diag": lambda: _joined(shared),
        "torch conv1d": lambda: _build(shared, shared.grouped, _conv1d),
        "torch einsum": lambda: _build(shared, shared.blocks, _einsum),
        "torch baddbmm": lambda: _build(shared, shared.blocks, _baddbmm),
    }


# ---- one call ---------------------------------------------------------------------------------------


class _Shared:
    """What the contenders of a cell share: x and dy, and the weights of those that store them alike."""

    def __init__(self, cell: Cell, problem: Problem, mode: str = ""):
        self.problem, self.optimizer, self.mode = problem, cell.optimizer, mode or cell.mode
        self.x, self.dy = torch.tensor(problem.x), torch.tensor(problem.dy)

    @functools.cached_property
    def dense(self):
        return _parameter(self.problem.dense.T)

    @functools.cached_property
    def blocks(self):
        return _parameter(self.problem.values)

    @functools.cached_property
    def grouped(self):
        values = self.problem.values  # [n, i, o], to the [n*o, i, 1] of a convolution
        return _parameter(values.swapaxes(1, 2).reshape(-1, values.shape[1], 1))

    @functools.cached_property
    def listed(self):
        return [_parameter(block.T) for block in self.problem.values]


def _parameter(array) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(np.ascontiguousarray(array)))


def _build(shared: _Shared, weight, apply) -> Run:
    if shared.mode == "forward":
        x = shared.x

        def forward():
            with torch.inference_mode():
                return apply(x, weight)

        return forward
    x, dy = shared.x.clone().requires_grad_(), shared.dy
    weights = weight if isinstance(weight, list) else [weight]
    optimizer = OPTIMIZERS[shared.optimizer](weights, lr=RATE, fused=True)

    def step():
        x.grad = None
        optimizer.zero_grad()
        y = apply(x, weight)
        y.backward(dy)
        optimizer.step()
        return y.detach()

    return step


# ---- layers: (x, w) to y ------------------------------------------------------------------------------


def _masked(shared: _Shared) -> Run:
    mask = torch.tensor(np.ascontiguousarray(shared.problem.mask.T))
    return _build(shared, shared.dense, lambda x, w: F.linear(x, w * mask))


def _csr(shared: _Shared) -> Run:
    """The values are the parameter: as a CSR tensor, it could not be trained by Adam."""
    pattern = shared.problem.pattern
    bounds, inputs = (torch.tensor(np.array(a)) for a in (pattern.col_ptr, pattern.row_index))
    shape = pattern.shape[::-1]

    def apply(x, values):
        return torch.sparse.mm(torch.sparse_csr_tensor(bounds, inputs, values, shape), x.t()).t()

    return _build(shared, _parameter(shared.problem.values), apply)


def _bsr(shared: _Shared) -> Run:
    block = shared.problem.pattern.block
    weight = shared.dense.detach().to_sparse_bsr(block[::-1]).requires_grad_(shared.mode == "training")
    return _build(shared, weight, lambda x, w: torch.sparse.mm(w, x.t()).t())


def _sparselab(shared: _Shared) -> Run:
    import sparselab
    import sparselab.ops

    sparselab.ops._clear_transpose_cache()  # it goes by the address of a matrix, which a later one may get
    inputs, outputs = shared.problem.pattern.shape
    layer = sparselab.SparseLinear(inputs, outputs, bias=False, sparsity=1 - shared.problem.density)
    # Our matrix instead of the one it drew, made as its constructor does.
    layer._csr = sparselab.PaddedCSR.from_dense(shared.dense.detach(), padding_ratio=layer.padding_ratio)
    layer._values = torch.nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    return _build(shared, layer._values, lambda x, _: layer(x))


def _joined(shared: _Shared) -> Run:
    _ = shared.problem.dense  # raises where the joined matrix is too large
    return _build(shared, shared.listed, lambda x, ws: F.linear(x, torch.block_diag(*ws)))


def _loop(x, weights):
    parts = x.chunk(len(weights), 1)
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weights, strict=True)], 1)


def _conv1d(x, weight):
    return F.conv1d(x[:, :, None], weight, groups=x.shape[1] // weight.shape[1])[:, :, 0]


def _einsum(x, blocks):
    return torch.einsum("bmi,mio->bmo", x.view(len(x), *blocks.shape[:2]), blocks).reshape(len(x), -1)


def _baddbmm(x, blocks):
    x_by_block = x.view(len(x), *blocks.shape[:2]).transpose(0, 1)
    y = torch.baddbmm(x.new_empty(()), x_by_block, blocks, beta=0)  # beta=0: there is no bias to add
    return y.transpose(0, 1).reshape(len(x), -1)
