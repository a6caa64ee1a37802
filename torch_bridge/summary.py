"""The rows of `jaxsparse.summary` for a torch model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from jaxsparse.models.summary import Row, dense_flops, largest
from torch_bridge import _linear
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear


def rows(model: nn.Module) -> Iterator[Row]:
    """Each module that has parameters of its own, where it is met first."""
    counted: set[int] = set()
    for path, module in model.named_modules():
        if "parametrizations" not in path.split("."):  # they are counted with the layer whose weight they compute
            own = {name: p for name, p in _own(module) if id(p) not in counted}
            counted |= {id(p) for p in own.values()}
            if own:
                yield _row(path, module, own)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").named_parameters()


def _row(path: str, module: nn.Module, own: dict[str, Any]) -> Row:
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    size = sum(map(math.prod, shapes.values()))
    tensors = list(own.values())
    about: tuple[Any, ...]
    if isinstance(module, BlockDiagLinear):
        n, i, o = module.weight.shape
        about = (n * i, n * o), (i, o), 1 / n, 2 * n * i * o
    elif isinstance(module, BlockSparseLinear):
        tensors += list(module.buffers(recurse=False))
        shape, block = (module.in_features, module.out_features), module._product.block
        about = shape, block, module.density, 2 * module.weight.numel()
    elif _linear.why_not(module) is None:
        about = _of_dense(module)
    else:
        about = largest(shapes), None, 1.0, 0 if isinstance(module, nn.Embedding) else dense_flops(shapes)
    shape, block, density, flops = about
    count = sum(t.numel() * t.element_size() for t in tensors)
    return Row(path, type(module).__name__, shape, block, density, size, count, flops)


def _of_dense(module: Any) -> tuple[Any, ...]:
    weight, mask = module.weight, module._buffers.get("weight_mask")
    shape = tuple(weight.shape) if _linear.is_conv1d(module) else tuple(weight.shape[::-1])
    density = 1.0 if mask is None else float((mask != 0).float().mean())
    return shape, None, density, 2 * weight.numel()
