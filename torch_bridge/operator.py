"""A FlatOp as one torch.library operator, for all who record or count operators: they keep it whole, know its shapes,
its derivative and its work."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torch_bridge import _flops, _watch, abstract
from torch_bridge._errors import BridgeError
from torch_bridge._views import NO_VIEWS, Views
from torch_bridge.dlpack import kept_operand, receive
from torch_bridge.flat_op import FlatOp

_NAME = "torch_bridge::call"
# A graph holds its functions by name. Compiled code is kept for the length of the process, and so are these.
_OPS: dict[str, FlatOp] = {}
_HANDLES: dict[FlatOp, str] = {}


def call(op: FlatOp, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
    """Calls `op` by the operator, on tensors that need not have values yet: its outputs, and the tree that they are the
    leaves of."""
    outputs = torch.ops.torch_bridge.call(list(tensors), handle_of(op))
    out, _ = abstract.trace(jax.eval_shape, op.fn, tensors)
    return outputs, out.tree


def call_in_graph(op: FlatOp, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
    """`call`, where a graph is made and torch.func's transforms can't be followed.

    Raises:
      BridgeError: under such a transform.
    """
    if _watch.transforms_active():
        raise BridgeError(
            f"{op.name} was called under a torch.func transform inside torch.compile or torch.jit.trace, whose "
            "operators have no rules for that. Apply jax.vmap or jax.grad to the JAX function, or leave the transform "
            "out of what is compiled."
        )
    return call(op, tensors)


def evaluate(op: FlatOp, tensors: Sequence[Tensor], views: Views = NO_VIEWS) -> tuple[tuple[Tensor, ...], Any]:
    """What `call` returns, without derivatives, and unseen by torch."""
    arrays = operands(op, tensors, views)
    out = op.infer(*arrays)
    return tuple([receive(leaf) for leaf in out.leaves]), out.tree  # operands live until the results are here


def operands(op: FlatOp, tensors: Sequence[Tensor], views: Views, places: Sequence[int] | None = None) -> list:
    """Tensors as operands of the jitted functions of `op`; `places` are their numbers, if not 0, 1, ..."""
    arrays = []
    for i, t in zip(places or range(len(tensors)), tensors, strict=True):
        try:
            arrays.append(kept_operand(views, op.places[i] if i < len(op.places) else None, t))
        except BridgeError as error:
            raise BridgeError(f"{op.name}: {op.describe(i)}: {error}") from error
    return arrays


def handle_of(op: FlatOp) -> str:
    """The name by which graphs call `op`. No two processes share one: torch caches graphs on disk."""
    if op not in _HANDLES:
        _HANDLES[op] = handle = f"{op.name}#{uuid.uuid4().hex}"
        _OPS[handle] = op
    return _HANDLES[op]


def is_inexact(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _find(handle: str) -> FlatOp:
    if handle not in _OPS:
        raise BridgeError(
            f"this graph calls the JAX function {handle.split('#')[0]}, which only the process that compiled or "
            "exported it has. Compile or export it again here."
        )
    return _OPS[handle]


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
    gradients = iter(torch.ops.torch_bridge.call([*ctx.saved_tensors, *cotangents], handle_of(op)))
    return [next(gradients) if m else None for m in ctx.mask], None


def _flops_of(tensors, handle, *, out_val) -> Any:
    """For torch.utils.flop_counter."""
    flops, size = abstract.trace(lambda work, *avals: _flops.count(work(*avals)), _find(handle).work, tensors)
    return size(flops)


_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # JAX launches on a stream of its own
torch.library.define(_NAME, "(Tensor[] tensors, str handle) -> Tensor[]", tags=(_UNSAFE,) if _UNSAFE else ())
torch.library.impl(_NAME, "default", _call)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
register_flop_formula(torch.ops.torch_bridge.call, get_raw=True)(_flops_of)
