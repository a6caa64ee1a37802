"""`jax2torch`: a JAX function of pytrees as a torch function with gradients."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_bridge.dlpack import BridgeError, Views, operand, receive
from torch_bridge.flat_op import FlatOp, Mask, Out

_MANY_VARIANTS = 16
_NO_VIEWS = Views()
_engine = getattr(torch._C, "_autograd", None)


def jax2torch(fn: Callable) -> Callable:
    """A JAX function of pytrees as a torch function that autograd can go through.

        f = jax2torch(lambda x, w: jnp.tanh(x @ w))
        f(x, w).sum().backward()

    It is compiled by `jax.jit` once per shape; backward runs a compiled pullback on residuals that the
    forward kept, computes only the gradients that are wanted, and can be differentiated again, to any order.

    Args:
      fn: a traceable function. Of its arguments, nested and keyword arguments included, tensors, NumPy arrays
        and jax.Arrays are traced; everything else is a compile-time constant and must be hashable.
    Returns:
      A function of the same arguments. Its result has the structure of `fn`'s, with a tensor for every leaf,
      in memory of its own. int64 arguments arrive as int32 after a check that they fit, unless JAX runs with
      64-bit types. Integer outputs carry no gradient. Complex gradients follow torch's convention.
      As in torch, an argument that is changed in place before backward raises there; all arguments are
      watched.
    Raises:
      BridgeError: for an argument that cannot cross (sparse, float64 without x64, ...) or is not hashable,
        and under torch.func transforms and forward-mode differentiation.
    """
    traced = TracedFunction(fn, getattr(fn, "__name__", type(fn).__name__))

    @functools.wraps(fn, updated=())
    def call(*args, **kwargs):
        return traced(args, kwargs)

    return call


class TracedFunction:
    """A function of pytrees as one FlatOp per structure and per set of constants.

    Attributes:
      name: for messages.
      leading: names of the first tensors, for messages; those after are named by their place in the
        arguments.
      skip: how many positional arguments are not the user's own.
    """

    def __init__(self, fn: Callable, name: str, leading: Sequence[str] = (), skip: int = 0):
        self.fn, self.name, self.leading, self.skip = fn, name, leading, skip
        self.ops: dict[Any, FlatOp] = {}
        self._lock = threading.Lock()

    def __reduce__(self):  # compiled code is no part of a copy or a pickle
        return TracedFunction, (self.fn, self.name, self.leading, self.skip)

    def __call__(self, args: tuple, kwargs: dict, views: Views = _NO_VIEWS) -> Any:
        tensors, key = self.split(args, kwargs)
        return run(self.op(key), tensors, views)

    def split(self, args: tuple, kwargs: dict) -> tuple[list[Tensor], Any]:
        """The tensors of a call, and a hashable key of all the rest."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        tensors, constants = [], []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                leaf = _as_tensor(leaf)
            is_tensor = isinstance(leaf, Tensor)
            constants.append(None if is_tensor else _Constant(leaf))
            if is_tensor:
                tensors.append(leaf)
        return tensors, (tree, tuple(constants))

    def op(self, key: Any) -> FlatOp:
        op = self.ops.get(key)
        if op is None:
            with self._lock:
                op = self.ops.setdefault(key, self._make(key))
            if len(self.ops) == _MANY_VARIANTS:
                warnings.warn(
                    f"{self.name} has been compiled for {_MANY_VARIANTS} different argument structures or "
                    "constants. Python numbers are compile-time constants here: pass torch.tensor(...) for "
                    "values that vary.",
                    stacklevel=4,
                )
        return op

    def _make(self, key: Any) -> FlatOp:
        tree, constants = key

        def flat(*xs):
            arrays = iter(xs)
            leaves = [next(arrays) if c is None else c.value for c in constants]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            try:
                out = self.fn(*args, **kwargs)
            except Exception as error:
                shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in xs)
                error.add_note(f"torch_bridge: this was raised while tracing {self.name} for {shapes}.")
                raise
            leaves, out_tree = jax.tree.flatten(out)
            return Out(tuple(jnp.asarray(leaf) for leaf in leaves), out_tree)

        return FlatOp(flat, self.name, lambda i: self._describe(key, i))

    def _describe(self, key: Any, i: int) -> str:
        if i < len(self.leading):
            return self.leading[i]
        tree, constants = key
        paths, _ = jax.tree.flatten_with_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
        traced = [path for (path, _), c in zip(paths, constants, strict=True) if c is None]
        (side, first, *rest) = traced[i]
        name = first.key if side.idx else first.idx - self.skip
        return f"argument {name}{jax.tree_util.keystr(tuple(rest))}"


def run(op: FlatOp, tensors: Sequence[Tensor], views: Views = _NO_VIEWS) -> Any:
    """Calls `op` on tensors, through autograd where a gradient can be asked for; returns its output tree."""
    outputs, tree = _run_flat(op, tensors, views)
    return jax.tree.unflatten(tree, outputs)


def operands(op: FlatOp, tensors: Sequence[Tensor], views: Views, places: Sequence[int] | None = None) -> list:
    """Tensors as operands of the jitted functions of `op`; `places` are their numbers, if not 0, 1, ..."""
    arrays = []
    for i, t in zip(places or range(len(tensors)), tensors, strict=True):
        try:
            arrays.append(views.operand(i, t))
        except BridgeError as error:
            raise BridgeError(f"{op.name}: {op.describe(i)}: {error}") from error
    return arrays


def _run_flat(op: FlatOp, tensors: Sequence[Tensor], views: Views) -> tuple[tuple[Tensor, ...], Any]:
    _refuse_transforms(op)
    if torch.is_grad_enabled():
        mask = tuple([t.requires_grad for t in tensors])
        if True in mask:
            tree: list[Any] = []
            return _Call.apply(op, mask, views, tree, *tensors), tree[0]
    arrays = operands(op, tensors, views)
    out = op.infer(*arrays)
    return tuple([receive(leaf) for leaf in out.leaves]), out.tree  # operands live until the results are here


class _Call(torch.autograd.Function):
    """One call of a FlatOp as a node of the graph. It has no setup_context: that costs 10 us a call."""

    @staticmethod
    def forward(ctx, op: FlatOp, mask: Mask, views: Views, tree: list, *tensors):
        arrays = operands(op, tensors, views)
        out, residuals = op.forward(mask)(*arrays)
        outputs = tuple([receive(leaf) for leaf in out.leaves])
        tree.append(out.tree)
        ctx.op, ctx.mask, ctx.views, ctx.plan = op, mask, views, residuals.plan
        ctx.inexact = tuple([_is_inexact(o) for o in outputs])
        ctx.mark_non_differentiable(*[o for o, inexact in zip(outputs, ctx.inexact, strict=True) if not inexact])
        # Computed residuals stay in JAX, unless someone wants to drop, move or count what torch saves.
        hooked = _saved_tensor_hooks_active()
        ctx.computed = None if hooked else residuals.leaves
        ctx.save_for_backward(*tensors, *(map(receive, residuals.leaves) if hooked else ()))
        return outputs

    @staticmethod
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors  # raises for a tensor changed in place, and for a second backward
        n = len(ctx.mask)
        cotangents = [c for c, inexact in zip(cotangents, ctx.inexact, strict=True) if inexact]
        if torch.is_grad_enabled():
            gradients, _ = _run_flat(ctx.op.vjp(ctx.mask), [*saved[:n], *cotangents], ctx.views)
        else:
            gradients = _first_order(ctx, saved[:n], saved[n:], cotangents)
        gradients = iter(gradients)
        return (None, None, None, None, *[next(gradients) if m else None for m in ctx.mask])


def _first_order(ctx, tensors, computed, cotangents) -> list[Tensor]:
    """The gradients by the compiled pullback, from the residuals."""
    op, plan = ctx.op, ctx.plan
    computed = [operand(t) for t in computed] if ctx.computed is None else ctx.computed
    inputs = operands(op, [tensors[i] for i in plan.inputs], ctx.views, plan.inputs)
    gradients = plan.backward(computed, inputs, [operand(c) for c in cotangents])
    results = [receive(g) for g in gradients]
    if ctx.computed is not None and not _keeps_graph():
        ctx.computed = ()  # free now, as torch frees what it saved; it refuses a second backward
    return results


class _Constant:
    """A hashable stand-in for an argument that is no array. 1, 1.0 and True differ, as do 0.0 and -0.0."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        self._key = (type(value), repr(value) if isinstance(value, (float, complex)) else value)

    def __hash__(self):
        try:
            return hash(self._key)
        except TypeError:
            raise BridgeError(
                f"an argument of type {type(self.value).__name__} is neither an array nor hashable. "
                "Pass tensors, pytrees of tensors, or hashable constants."
            ) from None

    def __eq__(self, other):
        return isinstance(other, _Constant) and self._key == other._key


def _as_tensor(leaf: Any) -> Any:
    """NumPy and JAX arrays as tensors that nobody else writes to; anything else as it is."""
    if isinstance(leaf, jax.Array):
        return receive(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, float):
        return torch.tensor(leaf)
    return leaf


def _is_inexact(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _refuse_transforms(op: FlatOp) -> None:
    probe = getattr(torch._C, "_are_functorch_transforms_active", None)
    if (probe is not None and probe()) or getattr(forward_ad, "_current_level", -1) >= 0:
        raise BridgeError(
            f"{op.name} was called under a torch.func transform or in forward-mode differentiation, which "
            "would not see through it. Apply jax.vmap, jax.jvp or jax.jacfwd to the JAX function, and pass "
            "the result to jax2torch."
        )


def _saved_tensor_hooks_active() -> bool:
    probe = getattr(_engine, "_top_saved_tensors_default_hooks", None)
    return True if probe is None else probe(False) is not None  # unknown: the slower way is right in both cases


def _keeps_graph() -> bool:
    probe = getattr(_engine, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else probe()  # unknown: keep, at the price of memory
