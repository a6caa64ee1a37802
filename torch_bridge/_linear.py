"""What a linear layer computes with now: the weight that its next forward pass would have, however it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_bridge._dense import lost_scale
from torch_bridge._watch import is_plain

_Layer = TypeVar("_Layer", bound=nn.Module)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Hooks that compute a weight before every forward pass, from parameters of other names, and what makes it one again.
_HOOKS: list[tuple[type, str]] = [
    (prune.BasePruningMethod, "torch.nn.utils.prune.remove(layer, {name!r})"),
    (WeightNorm, "torch.nn.utils.remove_weight_norm(layer, {name!r})"),
    (SpectralNorm, "torch.nn.utils.remove_spectral_norm(layer, {name!r})"),
]


class Part(NamedTuple):
    """A weight or a bias.

    Attributes:
      value: a detached tensor, which may be the layer's own memory.
      trains: whether it takes part in training.
    """

    value: Tensor
    trains: bool


class Linear(NamedTuple):
    """y = x W + b.

    Attributes:
      weight: W, (in, out).
      bias: b, or None.
      training: the layer's mode.
    """

    weight: Part
    bias: Part | None
    training: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        size_in, out = self.weight.value.shape
        return size_in, out

    @property
    def options(self) -> dict[str, Any]:
        """What a layer of the same kind is made with."""
        return {"bias": self.bias is not None, "device": self.weight.value.device, "dtype": self.weight.value.dtype}


def read(layer: nn.Module) -> Linear:
    """A `torch.nn.Linear`, or a transformers `Conv1D`, as it computes now.

    Raises:
      TypeError: for other layers.
      ValueError: for a layer with a forward pass of its own, and for weights that are no plain floating-point numbers
        or that something unknown computes.
    """
    reason = why_not(layer)
    if reason is not None:
        raise (ValueError if isinstance(layer, nn.Linear) else TypeError)(f"this layer {reason}")
    weight, bias = (present(layer, name) for name in ("weight", "bias"))
    assert weight is not None  # a Linear has one
    if bias is not None and bias.value.dtype != weight.value.dtype:
        raise ValueError(
            f"the weight is {weight.value.dtype} and the bias {bias.value.dtype}, and nothing is cast silently. Use "
            f"layer.to({weight.value.dtype})."
        )
    w = weight.value if is_conv1d(layer) else weight.value.T
    return Linear(Part(w, weight.trains), bias, layer.training)


def why_not(layer: nn.Module) -> str | None:
    """Why a layer is known not to compute x W + b with the weight and bias that it has, or None."""
    own = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    if is_conv1d(layer) or (isinstance(layer, nn.Linear) and not own):
        return None
    kind = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return (
            f"is a {kind} with a forward pass of its own, which need not be x W + b. Make it a torch.nn.Linear first."
        )
    return f"is a {kind}, and no torch.nn.Linear or Conv1D of transformers. Make it a torch.nn.Linear first."


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is the linear layer of GPT-2, whose weight is (in, out)."""
    kind = type(layer)
    is_theirs = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return is_theirs and "forward" not in vars(layer)


def fill(layer: _Layer, source: Linear, weight: Tensor, rescale: bool = False) -> _Layer:
    """A new layer that takes over a source's mode, bias and, from its weight, what is left of it."""
    if rescale:
        weight = weight * lost_scale(source.weight.value, weight)
    for name, part in (("weight", Part(weight, source.weight.trains)), ("bias", source.bias)):
        if part is not None:
            new: Tensor = getattr(layer, name)
            with torch.no_grad():
                new.copy_(part.value)
            new.requires_grad_(part.trains)
    return layer.train(source.training)


def read_sparse(layer: nn.Module) -> Linear:
    """A sparse layer as it computes now, with its stored blocks for the weight."""
    weight, bias = (present(layer, name) for name in ("weight", "bias"))
    assert weight is not None  # every layer has one
    return Linear(weight, bias, layer.training)


def to_dense(layer: nn.Module, expand: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A `torch.nn.Linear` that computes what a sparse layer does; `expand` makes (in, out) of its blocks."""
    source = read_sparse(layer)
    w = expand(source.weight.value)
    size_in, out = w.shape
    linear = nn.utils.skip_init(nn.Linear, size_in, out, **source.options)
    assert isinstance(linear, nn.Linear)
    return fill(linear, source, w.T)


def present(layer: nn.Module, name: str) -> Part | None:
    """A parameter as the next forward pass would have it; None where a layer has none.

    Between an optimizer's step and the next forward pass the attribute of this name may be out of date, or may have
    been computed without gradients.
    """
    with torch.inference_mode(False), torch.enable_grad():
        value = _compute(layer, name)
    if value is None:
        return None
    _check(type(layer).__name__, name, value)
    return Part(value.detach(), value.requires_grad)


def how_to_settle(layer: nn.Module) -> str | None:
    """The call that makes a computed weight a parameter again, if one is computed."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(layer, name):
            return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
    found = [
        (hook, call) for hook in layer._forward_pre_hooks.values() for kind, call in _HOOKS if isinstance(hook, kind)
    ]
    return found[0][1].format(name=_made_by(found[0][0])) if found else None


def pruning_hooks(layer: nn.Module) -> list[prune.BasePruningMethod]:
    """The hooks of torch.nn.utils.prune, which mask the weight and the bias before every forward pass."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]


def kept(layer: nn.Module) -> Tensor:
    """Which entries of the (out, in) weight are kept: those of torch's pruning mask, or else what is not zero."""
    if "weight" in map(_made_by, pruning_hooks(layer)):
        mask = layer._buffers["weight_mask"]
        assert mask is not None  # the hook multiplies by it
        return mask != 0
    return read(layer).weight.value.T != 0


def _compute(layer: nn.Module, name: str) -> Tensor | None:
    if name in layer._parameters:
        return layer._parameters[name]
    if parametrize.is_parametrized(layer, name):
        return getattr(layer, name)
    hooks = [h for h in layer._forward_pre_hooks.values() if isinstance(h, tuple(kind for kind, _ in _HOOKS))]
    if name not in map(_made_by, hooks):
        raise ValueError(
            f"the {name} of this {type(layer).__name__} is no parameter: something unknown computes it, and it may be "
            f"out of date. Make it one: layer.{name} = torch.nn.Parameter(...)."
        )
    for hook in hooks:  # all, and in order: one may compute what the next computes with
        if isinstance(hook, SpectralNorm):
            setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=False))
        else:
            hook(layer, ())
    return getattr(layer, name)


def _made_by(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name


def _check(kind: str, name: str, value: Tensor) -> None:
    """Raises ValueError for what is no plain dense matrix or vector of floats."""
    if is_lazy(value):
        raise ValueError(f"this {kind} has no {name} yet: call it once, on an input of the right size.")
    if not is_plain(value):
        raise ValueError(
            f"the {name} of this {kind} is a {type(value).__name__}, which says itself what its numbers are. Make a "
            "plain tensor of it first, such as a DTensor's full_tensor()."
        )
    if value.layout is not torch.strided:
        raise ValueError(f"the {name} of this {kind} has the layout {value.layout}: make it dense with to_dense().")
    if value.dtype not in _FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(f"the {name} of this {kind} is {value.dtype}, and sparse layers compute in {known}.")
