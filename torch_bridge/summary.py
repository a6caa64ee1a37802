"""The rows of `jaxsparse.summary` for a torch model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from jaxsparse.models.summary import Call, Product, Row, largest, of_unknown_kind
from torch_bridge import _linear
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear


def rows(model: nn.Module, inputs: Sequence[Any]) -> Iterator[Row]:
    """Each module that has parameters of its own, where it is met first."""
    calls = _calls(model, inputs) if inputs else None
    counted: set[int] = set()
    for path, module in model.named_modules():
        if "parametrizations" not in path.split("."):  # they are counted with the layer whose weight they compute
            own = {name: p for name, p in _own(module) if id(p) not in counted}
            counted |= {id(p) for p in own.values()}
            if own:
                yield _row(path, module, own, None if calls is None else calls.get(module, ()))


def _calls(model: nn.Module, inputs: Sequence[Any]) -> Mapping[nn.Module, list[Call]]:
    """The calls of each layer, on tensors that have shapes alone."""
    found: dict[nn.Module, list[Call]] = {}

    def look(module, args, y):
        if args and isinstance(args[0], torch.Tensor) and isinstance(y, torch.Tensor):
            found.setdefault(module, []).append(Call(args[0].numel(), y.numel(), 0))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors: dict[str, torch.Tensor] = {
        name: mode.from_tensor(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    device = next((t.device for t in tensors.values()), None)
    hooks = [module.register_forward_hook(look) for module in model.modules()]
    before = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}) for module in model.modules()
    ]
    try:
        with mode, torch.no_grad():
            shapes = [torch.empty(x.shape, dtype=x.dtype, device=device) if hasattr(x, "dtype") else x for x in inputs]
            # tie_weights=False: with it, torch 2.13 leaves its replacements in a layer that the model holds twice.
            torch.func.functional_call(model, tensors, tuple(shapes), tie_weights=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, kept in before:  # weights that hooks have computed, as those of torch.nn.utils.prune
            vars(module).update(kept)
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").named_parameters()


def _row(path: str, module: nn.Module, own: dict[str, Any], calls: Sequence[Call] | None) -> Row:
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    size = sum(map(math.prod, shapes.values()))
    tensors = list(own.values())
    about: tuple[Any, ...]
    if isinstance(module, BlockDiagLinear):
        n, i, o = module.weight.shape
        about = (n * i, n * o), (i, o), 1 / n, Product(2 * n * i * o, n * o)
    elif isinstance(module, BlockSparseLinear):
        tensors += list(module.buffers(recurse=False))
        shape, block = (module.in_features, module.out_features), module._product.block
        about = shape, block, module.density, Product(2 * module.weight.numel(), shape[1])
    elif _linear.why_not(module) is None:
        about = _of_dense(module)
    else:
        about = largest(shapes), None, 1.0, _product(module, shapes)
    shape, block, density, product = about
    count = sum(t.numel() * t.element_size() for t in tensors)
    flops = None if product is None else product.made_in(calls)
    return Row(path, type(module).__name__, shape, block, density, size, count, flops)


def _product(module: Any, shapes: dict[str, tuple[int, ...]]) -> Product | None:
    """Of a layer that is not linear."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Product(0)
    if not isinstance(module, _ConvNd):
        return of_unknown_kind(shapes)
    unit = module.in_channels if module.transposed else module.out_channels
    return Product(2 * module.weight.numel(), unit, of_input=module.transposed, by_row=False)


def _of_dense(module: Any) -> tuple[Any, ...]:
    weight, mask = module.weight, module._buffers.get("weight_mask")
    shape = tuple(weight.shape) if _linear.is_conv1d(module) else tuple(weight.shape[::-1])
    density = 1.0 if mask is None else float((mask != 0).float().mean())
    return shape, None, density, Product(2 * weight.numel(), shape[1])
