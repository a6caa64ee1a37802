"""Layers and their steps in PyTorch, as they are timed; what `jaxsparse.measure(..., torch=True)` runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jaxsparse.costs.layers import Layer
from torch_bridge import products
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear


def threads() -> int:
    """How many threads torch's products use."""
    return torch.get_num_threads()


def detour() -> str | None:
    """Why the sparse layers go through JAX on CPU tensors here; None where they go straight to the C++ kernels."""
    return products.WHY_NOT


def wide(dtype: str) -> contextlib.AbstractContextManager:
    """In which the dtype exists."""
    return contextlib.nullcontext()


def steps(layer: Layer, modes: tuple[str, ...]) -> list[Callable[[], Any]]:
    """What is timed of a layer with a random pattern, one function for each mode.

    Args:
      modes: of "forward"; "gradients", which is forward and backward pass; "step", with Adam after that.
    """
    module = _module(layer)
    x = torch.randn(layer.batch, layer.shape[0], dtype=getattr(torch, layer.dtype))
    return [_MODES[mode](module, x) for mode in modes]


def _gradients(module: nn.Module, x: Tensor) -> Callable[[], None]:
    wanted, dy = [x.requires_grad_(), *module.parameters()], torch.randn_like(module(x))

    def call() -> None:
        torch.autograd.grad(module(x), wanted, dy)

    return call


def _forward(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def _step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    x, adam = x.clone().requires_grad_(), torch.optim.Adam(module.parameters(), lr=1e-6, fused=True)
    dy = torch.randn_like(module(x))

    def call() -> None:
        x.grad = None
        adam.zero_grad()
        module(x).backward(dy)
        adam.step()

    return call


_MODES = {"forward": _forward, "gradients": _gradients, "step": _step}


def _module(layer: Layer) -> nn.Module:
    options: dict[str, Any] = {"bias": False, "dtype": getattr(torch, layer.dtype)}
    if layer.kind == "dense":
        return nn.Linear(*layer.shape, **options)
    if layer.kind == "block_diag":
        return BlockDiagLinear(*layer.shape, layer.stored, **options)
    if layer.kind == "sparse":
        return SparseLinear(*layer.shape, layer.density, **options)
    return BlockSparseLinear(*layer.shape, layer.density, layer.block, **options)
