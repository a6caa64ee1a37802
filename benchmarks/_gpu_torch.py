"""What PyTorch has for a cell of `gpu.py`, eager as one writes it, where that machine has it and it sees the GPU."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import numpy as np

from benchmarks._gpu_cells import Cell


def contenders(cell: Cell) -> dict[str, Callable[[], object]]:
    """Name to a function that starts one run; none where there is no PyTorch, or nothing to compete with."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    if cell.family == "block-diagonal":
        return _diagonal(torch, cell)
    if cell.family == "blocks" and cell.mode == "forward":  # its block-sparse product has no gradient
        return {"torch BSR": started(torch, _bsr(torch, cell))}
    return {}


class _Pending:
    """What `jax.block_until_ready` waits for."""

    def __init__(self, torch):
        self.block_until_ready = torch.cuda.synchronize


def started(torch, run: Callable[[], object]) -> Callable[[], object]:
    def start():
        run()
        return _Pending(torch)

    return start


def _bsr(torch, cell: Cell):
    """BSR stores by row of torch's weight [out, in], which is a column of ours."""
    p, options = cell.pattern, {"device": "cuda", "dtype": getattr(torch, cell.dtype)}
    values = torch.randn(p.nnzb, *cell.block[::-1], **options)
    bounds, at = (torch.tensor(np.asarray(a), device="cuda") for a in (p.col_ptr, p.row_index))
    weight = torch.sparse_bsr_tensor(bounds, at, values, size=cell.shape[::-1])
    x = torch.randn(cell.batch, cell.shape[0], **options)
    return functools.partial(torch.nn.functional.linear, x, weight)


def _diagonal(torch, cell: Cell) -> dict[str, Callable[[], object]]:
    m, (i, o) = cell.batch, cell.block
    n, options = cell.shape[0] // i, {"device": "cuda", "dtype": getattr(torch, cell.dtype)}
    learned = {**options, "requires_grad": cell.mode == "step"}
    x, w, b = torch.randn(m, n * i, **learned), torch.randn(n, i, o, **learned), torch.randn(n * o, **learned)
    dy, gelu = torch.randn(m, n * o, **options), functools.partial(torch.nn.functional.gelu, approximate="tanh")

    def baddbmm():
        y = torch.baddbmm(b.view(n, 1, o), x.view(m, n, i).transpose(0, 1), w)
        return gelu(y.transpose(0, 1).reshape(m, n * o))

    def einsum():
        return gelu(torch.einsum("bni,nio->bno", x.view(m, n, i), w).reshape(m, n * o) + b)

    def conv1d():
        return gelu(torch.nn.functional.conv1d(x[:, :, None], w.mT.reshape(n * o, i, 1), b, groups=n)[:, :, 0])

    def step(f):
        f().backward(dy)
        with torch.no_grad():
            w.sub_(w.grad, alpha=1e-3)
        x.grad = w.grad = b.grad = None

    found = {"torch baddbmm": baddbmm, "torch einsum": einsum, "torch grouped conv1d": conv1d}
    if cell.mode == "step":
        found = {name: functools.partial(step, f) for name, f in found.items()}
    return {name: started(torch, run) for name, run in found.items()}
