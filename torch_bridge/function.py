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

from torch_bridge import _watch
from torch_bridge._errors import BridgeError
from torch_bridge._handles import new_handle
from torch_bridge._views import NO_VIEWS, Views
from torch_bridge.autograd import run
from torch_bridge.compile import in_graph
from torch_bridge.dlpack import receive
from torch_bridge.flat_op import FlatOp, Out
from torch_bridge.operator import call_in_graph

_MANY = 16  # compilations of a kind, before a warning


def jax2torch(fn: Callable) -> Callable:
    """A JAX function of pytrees as a torch function that autograd can go through.

        f = jax2torch(lambda x, w: jnp.tanh(x @ w))
        f(x, w).sum().backward()

    It is compiled by `jax.jit` once per shape; backward runs a compiled pullback on residuals that the
    forward kept, computes only the gradients that are wanted, and can be differentiated again, to any order.
    torch.func's transforms, forward mode, torch.compile(fullgraph=True) and torch.export go through it; the
    latter two need arguments that their graphs can hold (tensors, numbers, strings; tuples, lists and dicts).
    To whatever else records or counts torch's operators (torch.jit.trace, make_fx, a TorchDispatchMode or
    TorchFunctionMode, FlopCounterMode) a call is one operator, torch_bridge::call, whose backward pass starts from the
    inputs again. torch.fx.symbolic_trace and torch.jit.script, which look at Python, are refused.

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
      BridgeError: for an argument that cannot cross (sparse, float64 without x64, a tensor subclass that has operators
        of its own, ...) or is not hashable.
      TypeError: in forward mode, if `fn` has a custom_vjp rule.
    """
    traced = TracedFunction(fn, getattr(fn, "__name__", type(fn).__name__))

    @functools.wraps(fn, updated=())
    def function(*args, **kwargs):
        return traced(args, kwargs)

    return function


class TracedFunction:
    """A function of pytrees as one FlatOp per structure and per set of constants.

    Attributes:
      name: for messages.
      leading: names of the first tensors, for messages; those after are named by their place in the
        arguments.
      skip: how many positional arguments are not the user's own.
      handle: the name by which a compiled graph calls it.
    """

    def __init__(self, fn: Callable, name: str, leading: Sequence[str] = (), skip: int = 0):
        self.fn, self.name, self.leading, self.skip = fn, name, leading, skip
        self.ops: dict[Any, FlatOp] = {}
        self.handle = new_handle(self, name)
        self._lock = threading.Lock()

    def __reduce__(self):  # compiled code is no part of a pickle
        return TracedFunction, (self.fn, self.name, self.leading, self.skip)

    def __deepcopy__(self, memo):  # it has no state: copies of a module share its compiled code
        return self

    def __call__(self, args: tuple, kwargs: dict, views: Views = NO_VIEWS) -> Any:
        if torch.compiler.is_compiling():
            return in_graph(self.handle, args, kwargs)
        tensors, key = self.split(args, kwargs)
        outputs, tree = run(self.op(key), tensors, views)
        return jax.tree.unflatten(tree, outputs)

    def in_graph(self, args: tuple, kwargs: dict) -> Any:
        """The same on tensors of a graph that is being made."""
        tensors, key = self.split(args, kwargs)
        outputs, tree = call_in_graph(self.op(key), tensors)
        return jax.tree.unflatten(tree, outputs)

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
            if len(self.ops) == _MANY:
                warnings.warn(
                    f"{self.name} has been compiled for {_MANY} different argument structures or "
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
                kinds = ", ".join(f"{x.dtype}{list(x.shape)}" for x in xs)
                error.add_note(f"torch_bridge: this was raised while tracing {self.name} for {kinds}.")
                raise
            leaves, out_tree = jax.tree.flatten(out)
            return Out(tuple(jnp.asarray(leaf) for leaf in leaves), out_tree)

        return FlatOp(flat, self.name, lambda i: self._describe(key, i), [_place(path) for path in _paths(key)])

    def _describe(self, key: Any, i: int) -> str:
        return self.leading[i] if i < len(self.leading) else f"argument {_place(_paths(key)[i], self.skip)}"


def _paths(key: Any) -> list[Any]:
    """Where in (args, kwargs) each of the tensors is."""
    tree, constants = key
    paths, _ = jax.tree.flatten_with_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
    return [path for (path, _), c in zip(paths, constants, strict=True) if c is None]


def _place(path: Any, skip: int = 0) -> str:
    """The argument, by name or number, and the place in it: `x`, `0[2]`."""
    (side, first, *rest) = path
    return f"{first.key if side.idx else first.idx - skip}{jax.tree_util.keystr(tuple(rest))}"


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
    """NumPy and JAX arrays as tensors that nobody else writes to, symbolic numbers as their value; anything else as
    it is."""
    if isinstance(leaf, jax.Array):
        return receive(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, float):
        return torch.tensor(leaf)
    _watch.refuse_symbols(leaf)
    if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(leaf)](leaf)
    return leaf
