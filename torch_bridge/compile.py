"""A FlatOp as one torch.library operator: torch.compile and torch.export keep it whole, and know its shapes."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import torch
from torch import Tensor

from torch_bridge import abstract
from torch_bridge._errors import BridgeError
from torch_bridge.autograd import evaluate, is_inexact, transforms_active
from torch_bridge.flat_op import FlatOp

_NAME = "torch_bridge::call"
# A graph holds its functions by name. Compiled code is kept for the length of the process, and so are these.
_OPS: dict[str, FlatOp] = {}
_HANDLES: dict[FlatOp, str] = {}
_STRUCTURES: dict[str, Any] = {}
_FUNCTIONS: weakref.WeakValueDictionary[str, InGraph] = weakref.WeakValueDictionary()


class InGraph(Protocol):
    """What `in_graph` can call."""

    def in_graph(self, args: tuple, kwargs: dict) -> Any: ...


def new_handle(function: InGraph, name: str) -> str:
    """A name by which a graph can call `function`, for as long as that lives.

    No two processes share one: torch caches graphs on disk, and would take one function for another.
    """
    handle = f"{name}#{uuid.uuid4().hex}"
    _FUNCTIONS[handle] = function
    return handle


def in_graph(handle: str, args: tuple, kwargs: dict) -> Any:
    """Calls a function by its handle, as one node of torch.compile's graph, which need not understand its inside."""
    outputs = _flat_in_graph(handle, args, kwargs)
    return _build(_structure(handle), outputs)


@torch.compiler.allow_in_graph
def _flat_in_graph(handle: str, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    outputs, tree = jax.tree.flatten(_FUNCTIONS[handle].in_graph(_plain(args), _plain(kwargs)))
    _STRUCTURES[handle] = _spell(jax.tree.unflatten(tree, range(len(outputs))))
    return tuple(outputs)


@torch.compiler.assume_constant_result
def _structure(handle: str) -> Any:
    """What the call that has just been traced returns: a graph's node itself can return no dicts."""
    return _STRUCTURES[handle]


def _spell(tree: Any) -> Any:
    """A tree of numbers in nested tuples, the only containers that torch.compile takes for constants."""
    if isinstance(tree, dict):
        return "dict", tuple(tree), tuple(map(_spell, tree.values()))
    if type(tree) in (tuple, list):
        return type(tree).__name__, tuple(map(_spell, tree))
    if tree is None or isinstance(tree, int):
        return tree
    raise BridgeError(
        f"a {type(tree).__name__} cannot come out of a compiled graph. Return tuples, lists and dicts from the JAX "
        "function."
    )


def _build(spelled: Any, outputs: tuple[Tensor, ...]) -> Any:
    """The tree, with tensors for its numbers."""
    if spelled is None or isinstance(spelled, int):
        return None if spelled is None else outputs[spelled]
    if spelled[0] == "dict":
        return {key: _build(value, outputs) for key, value in zip(spelled[1], spelled[2], strict=True)}
    values = [_build(value, outputs) for value in spelled[1]]
    return tuple(values) if spelled[0] == "tuple" else values


def call(op: FlatOp, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
    """What `autograd.run` returns, by the operator, on tensors that need not have values yet."""
    if transforms_active():
        raise BridgeError(
            f"{op.name} was called under a torch.func transform inside torch.compile, whose operators have no rules "
            "for that. Apply jax.vmap or jax.grad to the JAX function, or leave the transform out of torch.compile."
        )
    outputs = torch.ops.torch_bridge.call(list(tensors), _handle(op))
    out, _ = abstract.trace(jax.eval_shape, op.fn, tensors)
    return outputs, out.tree


def _handle(op: FlatOp) -> str:
    if op not in _HANDLES:
        _HANDLES[op] = handle = f"{op.name}#{uuid.uuid4().hex}"
        _OPS[handle] = op
    return _HANDLES[op]


def _find(handle: str) -> FlatOp:
    if handle not in _OPS:
        raise BridgeError(
            f"this graph calls the JAX function {handle.split('#')[0]}, which only the process that compiled or "
            "exported it has. Compile or export it again here."
        )
    return _OPS[handle]


def _plain(tree: Any) -> Any:
    """FX hands over lists and dicts of its own types, which are no pytrees to JAX."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list) or type(tree) is tuple:
        return (tuple if isinstance(tree, tuple) else list)(map(_plain, tree))
    return tree


def _call(tensors: list[Tensor], handle: str) -> list[Tensor]:
    return list(evaluate(_find(handle), tensors)[0])


def _fake(tensors, handle):
    out, size = abstract.trace(jax.eval_shape, _find(handle).fn, tensors)
    device = tensors[0].device if tensors else "cpu"
    return [
        torch.empty([size(d) for d in leaf.shape], dtype=abstract.torch_dtype(leaf.dtype), device=device)
        for leaf in out.leaves
    ]


def _setup_context(ctx, inputs, output):
    tensors, ctx.handle = inputs
    ctx.mask = tuple([t.requires_grad for t in tensors])
    ctx.inexact = [is_inexact(o) for o in output]
    ctx.save_for_backward(*tensors)


def _backward(ctx, cotangents):
    """The gradients by the same operator, which starts from the inputs again: its residuals have no name in a graph."""
    cotangents = [c for c, inexact in zip(cotangents, ctx.inexact, strict=True) if inexact]
    op = _find(ctx.handle).vjp(ctx.mask)
    gradients = iter(torch.ops.torch_bridge.call([*ctx.saved_tensors, *cotangents], _handle(op)))
    return [next(gradients) if m else None for m in ctx.mask], None


_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # JAX launches on a stream of its own
torch.library.define(_NAME, "(Tensor[] tensors, str handle) -> Tensor[]", tags=(_UNSAFE,) if _UNSAFE else ())
torch.library.impl(_NAME, "default", _call)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
