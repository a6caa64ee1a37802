"""`from_flax`: a Linen or NNX model as a torch.nn.Module that owns its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import Tensor, nn

from torch_bridge._errors import BridgeError
from torch_bridge._linen import LinenCall
from torch_bridge._nnx import NNXCall
from torch_bridge._views import Views
from torch_bridge._watch import refuse_script
from torch_bridge.dlpack import jax_to_torch, torch_to_jax
from torch_bridge.model import ModelFunction


def from_flax(
    module: linen.Module | nnx.Module,
    variables: Any = None,
    *,
    rngs: tuple[str, ...] = ("dropout",),
    train_kwarg: str | None = "auto",
    method: Any = None,
    cast_inputs: torch.dtype | None = None,
) -> FlaxModule:
    """A Flax model as a torch.nn.Module, trained by torch optimizers and called on tensors.

    Its parameters are copies in torch's own memory, which JAX then reads in place; the arrays given here
    never change. `state_dict()` keys are the Flax paths, dotted; Linen's begin with the collection, as in
    "params.Dense_0.kernel". Everything that is not a parameter (batch statistics, sparsity patterns) becomes
    a buffer, updated in place by the forward pass where the model updates it. Random keys are drawn from
    torch's generator, and only by models that use them, so `torch.manual_seed` and checkpointing apply.

    Args:
      module: a flax.linen.Module, or an nnx.Module (which is copied with its parameters).
      variables: Linen only: what `module.init` returned, or a checkpoint of the same structure.
      rngs: Linen only: names of the random streams. "dropout" is given in training mode only.
      train_kwarg: Linen only: the argument through which the module learns its mode from train() and eval().
        "not name" is for an argument with the opposite sense, None for none; "auto" looks for train,
        training, is_training, deterministic, eval and use_running_average, in this order. An explicit
        argument in a call wins.
      method: Linen only: what to call instead of `__call__`, as in `module.apply`.
      cast_inputs: under torch.autocast, cast floating-point inputs to this dtype, as torch.amp.custom_fwd
        does. Without it autocast does not touch the model.
    Returns:
      The module; its `variables()` and `load_variables(v)` lead back to Flax.
    Raises:
      BridgeError: for leaves that torch has no dtype for, and names that cannot be in a state_dict key.
      TypeError: if `module` is neither kind, or `variables` is missing, or given for NNX.
    """
    if isinstance(module, linen.Module):
        if variables is None:
            raise TypeError("a Linen module has no parameters of its own: pass variables=module.init(key, x).")
        call = LinenCall(module, variables, rngs=tuple(rngs), train_kwarg=train_kwarg, method=method)
        return FlaxModule(call, call.flatten(variables), cast_inputs)
    if isinstance(module, nnx.Module):
        if variables is not None:
            raise TypeError(
                "an NNX model holds its own variables. Put them in with nnx.update(model, variables) first."
            )
        call = NNXCall(module)
        return FlaxModule(call, call.flatten(nnx.state(module)), cast_inputs)
    raise TypeError(f"from_flax takes a flax.linen.Module or an nnx.Module, got {type(module).__name__}.")


class FlaxModule(nn.Module):
    """What `from_flax` returns."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, call: LinenCall | NNXCall, leaves: list[tuple[str, Any]], cast_inputs: torch.dtype | None):
        super().__init__()
        self.call = call
        self._slots: list[tuple[nn.Module, str]] = []
        for (name, leaf), is_param in zip(leaves, call.is_param, strict=True):
            self._adopt(name, leaf, is_param)
        self._model = ModelFunction(call, cast_inputs)
        self._views = Views(f"0[{i}]" for i, is_param in enumerate(call.is_param) if is_param)

    def forward(self, *args, **kwargs):
        return self._model(self._tensors(), self._views, self.training, args, kwargs)

    def variables(self) -> Any:
        """A copy of all parameters and buffers as Flax has them: a dict of collections, or an nnx.State."""
        return self.call.assemble(torch_to_jax([t.detach() for t in self._tensors()]))

    def load_variables(self, variables: Any) -> None:
        """Copies Flax variables into the parameters and buffers, in place, so that optimizers go on working.

        Raises:
          ValueError: if names, shapes or dtypes differ; nothing is changed then.
        """
        new = dict(self.call.flatten(variables))
        missing, extra = sorted(set(self.call.names) - new.keys()), sorted(new.keys() - set(self.call.names))
        if missing or extra:
            raise ValueError(f"these variables are of another model: they lack {missing}, and have {extra} in excess.")
        tensors = [_to_tensor(name, new[name]) for name in self.call.names]
        for name, (scope, last), t in zip(self.call.names, self._slots, tensors, strict=True):
            _check_replaces(name, {**scope._parameters, **scope._buffers}.get(last), t)
        with torch.no_grad():
            for old, t in zip(self._tensors(), tensors, strict=True):
                old.copy_(t)

    def _get_name(self) -> str:
        return self.call.name

    def _adopt(self, name: str, leaf: Any, is_param: bool) -> None:
        """Puts a copy of a leaf under its path, in torch's dicts: Flax names may equal Module attributes."""
        *path, last = name.split(".")
        scope: nn.Module = self
        for part in path:
            scope = scope._modules.setdefault(part, _Scope())  # pyright: ignore[reportAssignmentType]
        t = _to_tensor(name, leaf)
        if is_param:
            scope._parameters[last] = nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex())
        else:
            scope._buffers[last] = t
        self._slots.append((scope, last))

    def _tensors(self) -> list[Tensor]:
        """All leaves as they are now: plain, swapped in by functional_call, or parametrized."""
        found = []
        for scope, name in self._slots:
            t = scope._parameters.get(name)
            if t is None:
                t = scope._buffers.get(name)
            found.append(getattr(scope, name) if t is None else t)
        return found


class _Scope(nn.Module):
    """A node of the parameter tree, which gives state_dict its dotted paths."""

    def extra_repr(self) -> str:
        held = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}: {tuple(t.shape)}" for name, t in held.items() if t is not None)


def _to_tensor(name: str, leaf: Any) -> Tensor:
    """A copy of a leaf; checkpoints restored by Flax hold NumPy arrays."""
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise BridgeError(f"{name} is a {type(leaf).__name__}, and torch keeps only arrays. Make it a jax.Array.")
    array = jnp.asarray(leaf)
    if array.dtype != leaf.dtype:
        raise BridgeError(f"{name} is {leaf.dtype}, which JAX would narrow to {array.dtype}. Convert it yourself.")
    return jax_to_torch(array)


def _check_replaces(name: str, old: Tensor | None, t: Tensor) -> None:
    if old is None:
        raise ValueError(f"{name} is parametrized here. Remove the parametrization before loading variables.")
    if (old.shape, old.dtype) != (t.shape, t.dtype):
        raise ValueError(
            f"{name} is {old.dtype}{list(old.shape)} here, and {t.dtype}{list(t.shape)} in these variables. "
            "Convert them first, or wrap a model of that size."
        )
