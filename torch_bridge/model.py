"""A Flax model's call on tensors: its mode, its randomness, and the variables that it updates. Owns no tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor

from torch_bridge import _watch, abstract, compile
from torch_bridge._handles import new_handle
from torch_bridge._linen import LinenCall
from torch_bridge._nnx import NNXCall
from torch_bridge._views import Views
from torch_bridge.autograd import run
from torch_bridge.flat_op import FlatOp
from torch_bridge.function import TracedFunction
from torch_bridge.operator import call_in_graph


class ModelFunction:
    """A Flax model as a function of tensors that somebody else owns.

    Attributes:
      flax: the model as a function of its leaves.
      cast_inputs: under torch.autocast, the dtype that floating-point inputs are cast to, or None.
      traced: `flax` as torch calls it.
      handle: the name by which a compiled graph calls it.
    """

    def __init__(self, flax: LinenCall | NNXCall, cast_inputs: torch.dtype | None):
        self.flax, self.cast_inputs = flax, cast_inputs
        self.traced = TracedFunction(flax, flax.name, leading=flax.names, skip=3)
        self.handle = new_handle(self, flax.name)
        self._plans: dict[Any, _Plan] = {}

    def __reduce__(self):  # compiled code is no part of a pickle
        return ModelFunction, (self.flax, self.cast_inputs)

    def __deepcopy__(self, memo):  # it has no state: copies of a module share its compiled code
        return self

    def __call__(self, leaves: list[Tensor], views: Views, training: bool, args: tuple, kwargs: dict) -> Any:
        """The model's output; leaves that the model changes are changed in place."""
        if type(args) is not tuple:
            _watch.refuse_symbols(args)
        if torch.compiler.is_compiling():
            return compile.in_graph(self.handle, (leaves, training, args), kwargs)
        return self._run(functools.partial(run, views=views), leaves, training, args, kwargs)

    def in_graph(self, args: tuple, kwargs: dict) -> Any:
        """The same on tensors of a graph that is being made."""
        leaves, training, args = args
        return self._run(call_in_graph, leaves, training, args, kwargs)

    def _run(self, how: Callable, leaves: list[Tensor], training: bool, args: tuple, kwargs: dict) -> Any:
        if self.cast_inputs is not None:
            args, kwargs = jax.tree.map(self._cast, (args, kwargs))
        n = len(leaves)
        tensors, key = self.traced.split((leaves, None, training, *args), kwargs)
        plan = self._plan(leaves, training, args, kwargs, (key, *[t.shape for t in tensors[n:]]))
        if plan.is_random:
            tensors.insert(n, _draw_seed(leaves))
        for i in plan.changing:  # autograd keeps what it was given, and the original is about to be overwritten
            tensors[i] = leaves[i].clone()
        outputs, tree = how(plan.op, tensors)
        out, new = jax.tree.unflatten(tree, outputs)
        with torch.no_grad():
            for i, value in new.items():
                leaves[i].copy_(value)
        return out

    def _plan(self, leaves: list[Tensor], training: bool, args: tuple, kwargs: dict, kind: Any) -> _Plan:
        """How to make calls of this kind: traced once per kind."""
        if torch.compiler.is_compiling() or _watch.is_seen():
            return self._make_plan(leaves, training, args, kwargs)  # its sizes may be symbols, which are no key
        if kind not in self._plans:
            self._plans[kind] = self._make_plan(leaves, training, args, kwargs)
        return self._plans[kind]

    def _make_plan(self, leaves: list[Tensor], training: bool, args: tuple, kwargs: dict) -> _Plan:
        seed = torch.zeros(2, dtype=torch.int32)
        tensors, key = self.traced.split((leaves, seed, training, *args), kwargs)
        op = self.traced.op(key)
        make_jaxpr = functools.partial(jax.make_jaxpr, return_shape=True)
        (closed, out), _ = abstract.trace(lambda fn, *avals: make_jaxpr(fn)(*avals), op.fn, tensors)
        _, changed = jax.tree.unflatten(out.tree, out.leaves)
        is_random = _depends_on(closed.jaxpr, len(leaves))
        if not is_random:
            op = self.traced.op(self.traced.split((leaves, None, training, *args), kwargs)[1])
        return _Plan(op, is_random, tuple(changed))

    def _cast(self, t: Any) -> Any:
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return t.to(self.cast_inputs) if is_float and torch.is_autocast_enabled(t.device.type) else t


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How to make one kind of call: with or without a seed after the leaves, and which leaves it changes."""

    op: FlatOp
    is_random: bool
    changing: tuple[int, ...]


def _depends_on(jaxpr: Any, i: int) -> bool:
    """Whether an output can depend on argument i."""
    reached = {id(jaxpr.invars[i])}
    for equation in jaxpr.eqns:
        if any(id(v) in reached for v in equation.invars):
            reached.update(id(v) for v in equation.outvars)
    return any(id(v) in reached for v in jaxpr.outvars)


def _draw_seed(leaves: list[Tensor]) -> Tensor:
    seed = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device="cpu")
    return seed.to(leaves[0].device) if leaves else seed
