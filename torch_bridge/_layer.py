"""What the sparse layers have in common: their parameters, and where a call of one goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_bridge import _watch, products
from torch_bridge._matrix import ACTIVATIONS, Diagonal, Matrix
from torch_bridge._views import NO_VIEWS


def multiply(layer: Any, x: Tensor, index, matrix: Matrix) -> Tensor:
    """What the layer gives for x; `index` is None for a block-diagonal weight."""
    weight, bias, views, activation = layer.weight, layer.bias, layer._views, layer.activation
    if isinstance(x, torch.fx.Proxy) or x.is_meta:  # a graph is made, or only the shape is asked for
        return matrix.operator("multiply", x, weight, bias, activation)
    if _watch.any_autocast() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (products.as_autocast(t, dtype) for t in (x, weight, bias))
        views = NO_VIEWS  # the casts are new tensors every time
    if x.dtype != weight.dtype:
        raise ValueError(
            f"the input is {x.dtype}, but the weight {weight.dtype}, and nothing is cast silently. Use "
            f"x.to({weight.dtype}), layer.to({x.dtype}), or torch.autocast."
        )
    if products.is_direct(x, weight, layer._product.backend) or products.goes_to_onnx():
        return products.multiply(matrix, x, weight, bias, activation)
    y = layer._through_jax({"bias": bias, "index": index, "weight": weight, "x": x}, views)
    return ACTIVATIONS[activation](y) if activation else y


def multiply_diagonal(layer: Any, x: Tensor, matrix: Diagonal) -> Tensor:
    """`multiply` with a block-diagonal weight; a short way where torch's own operators are all that it comes to."""
    weight, activation = layer.weight, layer.activation
    if products.is_torchs(matrix, x, weight, layer._product.backend):
        y = matrix.by_torch(x, weight, layer.bias)
        return y if activation is None else ACTIVATIONS[activation](y)
    return multiply(layer, x, None, matrix)


def known(activation: str | None) -> str | None:
    """The activation, if there is one of this name."""
    if activation is None or activation in ACTIVATIONS:
        return activation
    raise ValueError(
        f"unknown activation {activation!r}: give {', '.join(map(repr, ACTIVATIONS))} or None, and call others on the "
        "result."
    )


def shown(activation: str | None) -> str:
    """The end of a layer's `extra_repr`."""
    return "" if activation is None else f", activation={activation!r}"


def make_parameters(layer: nn.Module, shape: tuple[int, ...], out: int | None, device, dtype) -> None:
    """Gives a layer its weight, and its bias unless `out` is None; empty."""
    layer.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    bias = None if out is None else nn.Parameter(torch.empty(out, device=device, dtype=dtype))
    layer.register_parameter("bias", bias)


def draw_parameters(layer: nn.Module, fan_in: int) -> None:
    """Draws both as `torch.nn.Linear` does."""
    bound = 1 / math.sqrt(fan_in)
    for p in layer.parameters(recurse=False):
        nn.init.uniform_(p, -bound, bound)
