"""Contenders in torch: our layers, dense, masked, CSR or BSR, and SparseLab where it is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jaxsparse.bench.grid import Cell, Problem
from jaxsparse.bench.in_jax import RATE
from torch_bridge.nn import BlockSparseLinear, SparseLinear

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


def _build(cell: Cell, problem: Problem, weight: Tensor, apply: _Apply) -> Callable[[], Any]:
    x, dy = _tensor(problem.x), _tensor(problem.dy)
    wait = torch.cuda.synchronize if _device() == "cuda" else lambda: None

    def forward():
        with torch.inference_mode():
            y = apply(x)
        wait()
        return y

    def step():
        x.grad = weight.grad = None
        y = apply(x)
        y.backward(dy)
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=RATE)  # pyright: ignore[reportArgumentType]
        wait()
        return y.detach()

    x.requires_grad_(cell.train)
    weight.requires_grad_(cell.train)
    return step if cell.train else forward


def _ours(cell: Cell, problem: Problem) -> Callable[[], Any]:
    kind = SparseLinear if cell.block == 1 else BlockSparseLinear
    values = _tensor(problem.values)
    layer = kind(*problem.shape, pattern=problem.pattern, bias=False, device=_device(), dtype=values.dtype)
    with torch.no_grad():
        layer.weight.copy_(values)
    return _build(cell, problem, layer.weight, layer)


def _dense(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight = _tensor(problem.dense.T)
    return _build(cell, problem, weight, lambda x: F.linear(x, weight))


def _masked(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight, mask = _tensor(problem.dense.T), _tensor(problem.mask.T)
    return _build(cell, problem, weight, lambda x: F.linear(x, weight * mask))


def _csr(cell: Cell, problem: Problem) -> Callable[[], Any]:
    """The values are the parameter; the columns of (in, out) are the rows of torch's (out, in)."""
    values, p = _tensor(problem.values), problem.pattern
    bounds, inputs = (torch.tensor(np.asarray(a)).to(_device()) for a in (p.col_ptr, p.row_index))

    def apply(x):
        w = torch.sparse_csr_tensor(bounds, inputs, values, p.shape[::-1], check_invariants=False)
        return torch.sparse.mm(w, x.t()).t()

    return _build(cell, problem, values, apply)


def _bsr(cell: Cell, problem: Problem) -> Callable[[], Any]:
    weight = _tensor(problem.dense.T).to_sparse_bsr((cell.block, cell.block))
    return _build(cell, problem, weight, lambda x: torch.sparse.mm(weight, x.t()).t())


def _sparselab(cell: Cell, problem: Problem) -> Callable[[], Any]:
    import sparselab  # pyright: ignore[reportMissingImports]

    layer = sparselab.SparseLinear(*problem.shape, bias=False, sparsity=1 - cell.density)
    # Our matrix in the place of the one that it drew, made as its constructor does.
    layer._csr = sparselab.PaddedCSR.from_dense(_tensor(problem.dense.T), padding_ratio=layer.padding_ratio)
    layer._values = torch.nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    return _build(cell, problem, layer._values, layer)
