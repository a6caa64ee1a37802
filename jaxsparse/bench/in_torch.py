"""Contenders in torch: our layers, dense, masked, CSR or BSR, SparseLab, and what people do with diagonal blocks."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jaxsparse.bench.grid import Cell, Problem
from jaxsparse.bench.in_jax import RATE
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear

_Apply = Callable[[Tensor], Tensor]


def why_not() -> str | None:
    """Why torch does not compete: on a GPU it must see the same one as JAX."""
    if jax.default_backend() in ("cpu", "gpu") and (jax.default_backend() == "cpu" or torch.cuda.is_available()):
        return None
    return f"JAX runs on {jax.default_backend()}, and this torch does not"


def builders(cell: Cell, problem: Problem) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes a call; the call waits, and returns y."""
    warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
    everyone = {
        "jaxsparse, torch": lambda: _ours(cell, problem),
        "torch dense": lambda: _dense(cell, problem),
        "torch masked": lambda: _masked(cell, problem),
    }
    if cell.diagonal:
        return everyone | _for_diagonal_blocks(cell, problem)
    if cell.block > 1:
        return everyone | {"torch BSR": lambda: _bsr(cell, problem)}
    everyone["torch CSR"] = lambda: _csr(cell, problem)
    if importlib.util.find_spec("sparselab") and cell.dtype == "float32" and _device() == "cpu":
        everyone["SparseLab"] = lambda: _sparselab(cell, problem)
    return everyone


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _tensor(a: np.ndarray) -> Tensor:
    """In its own dtype; torch reads no bfloat16 of NumPy."""
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(a.astype(np.float32))).to(_device(), torch.bfloat16)
    return torch.from_numpy(np.array(a)).to(_device())


def _build(cell: Cell, problem: Problem, weights: Sequence[Tensor], apply: _Apply) -> Callable[[], Any]:
    x, dy = _tensor(problem.x), _tensor(problem.dy)
    wait = torch.cuda.synchronize if _device() == "cuda" else lambda: None

    def forward():
        with torch.inference_mode():
            y = apply(x)
        wait()
        return y

    def step():
        for operand in (x, *weights):
            operand.grad = None
        y = apply(x)
        y.backward(dy)
        with torch.no_grad():
            for weight in weights:
                weight.sub_(weight.grad, alpha=RATE)  # pyright: ignore[reportArgumentType]
        wait()
        return y.detach()

    for operand in (x, *weights):
        operand.requires_grad_(cell.train)
    return step if cell.train else forward


def _ours(cell: Cell, problem: Problem) -> Callable[[], Any]:
    values = _tensor(problem.values)
    options: Any = {"bias": False, "device": _device(), "dtype": values.dtype}
    if cell.diagonal:
        layer = BlockDiagLinear(*problem.shape, cell.diagonal, **options)
    else:
        kind = SparseLinear if cell.block == 1 else BlockSparseLinear
        layer = kind(*problem.shape, pattern=problem.pattern, **options)
    with torch.no_grad():
        layer.weight.copy_(values.view_as(layer.weight))
    return _build(cell, problem, [layer.weight], layer)


def _dense(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight = _tensor(problem.dense.T)
    return _build(cell, problem, [weight], lambda x: F.linear(x, weight))


def _masked(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight, mask = _tensor(problem.dense.T), _tensor(problem.mask.T)
    return _build(cell, problem, [weight], lambda x: F.linear(x, weight * mask))


def _csr(cell: Cell, problem: Problem) -> Callable[[], Any]:
    """The values are the parameter; the columns of (in, out) are the rows of torch's (out, in)."""
    values, p = _tensor(problem.values), problem.pattern
    bounds, inputs = (torch.tensor(np.asarray(a)).to(_device()) for a in (p.col_ptr, p.row_index))

    def apply(x):
        w = torch.sparse_csr_tensor(bounds, inputs, values, p.shape[::-1], check_invariants=False)
        return torch.sparse.mm(w, x.t()).t()

    return _build(cell, problem, [values], apply)


def _bsr(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight = _tensor(problem.dense.T).to_sparse_bsr((cell.block, cell.block))
    return _build(cell, problem, [weight], lambda x: torch.sparse.mm(weight, x.t()).t())


def _for_diagonal_blocks(cell: Cell, problem: Problem) -> dict[str, Callable[[], Callable[[], Any]]]:
    """A loop of linear layers, a batched product (`baddbmm` is that with a bias), einsum, a grouped convolution."""
    n, i, o = cell.values_shape

    def loop(x, *rows):
        return torch.cat([F.linear(part, w) for part, w in zip(x.chunk(n, -1), rows, strict=True)], -1)

    def batched(x, blocks):
        return torch.bmm(x.view(-1, n, i).transpose(0, 1), blocks).transpose(0, 1).reshape(-1, n * o)

    def einsum(x, blocks):
        return torch.einsum("bni,nio->bno", x.view(-1, n, i), blocks).flatten(1)

    def grouped(x, filters):
        return F.conv1d(x[:, :, None], filters, groups=n)[:, :, 0]

    def build(way, make):
        weights = [w.clone(memory_format=torch.contiguous_format) for w in make(_tensor(problem.values).view(n, i, o))]
        return _build(cell, problem, weights, lambda x: way(x, *weights))

    ways = {
        "torch loop of Linear": (loop, lambda blocks: blocks.mT),
        "torch bmm": (batched, lambda blocks: [blocks]),
        "torch einsum": (einsum, lambda blocks: [blocks]),
        "torch grouped conv1d": (grouped, lambda blocks: [blocks.mT.reshape(n * o, i, 1)]),
    }
    return {name: lambda way=way: build(*way) for name, way in ways.items()}


def _sparselab(cell: Cell, problem: Problem) -> Callable[[], Any]:
    import sparselab  # pyright: ignore[reportMissingImports]

    layer = sparselab.SparseLinear(*problem.shape, bias=False, sparsity=1 - cell.density)
    # Our matrix in the place of the one that it drew, made as its constructor does.
    layer._csr = sparselab.PaddedCSR.from_dense(_tensor(problem.dense.T), padding_ratio=layer.padding_ratio)
    layer._values = torch.nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    return _build(cell, problem, [layer._values], layer)
