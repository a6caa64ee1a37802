"""A FlatOp on tensors: through torch's autograd, through torch.func and forward mode, or straight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bridge import _watch
from torch_bridge._views import NO_VIEWS, Views
from torch_bridge.dlpack import operand, receive
from torch_bridge.flat_op import FlatOp, Mask
from torch_bridge.operator import call, call_in_graph, evaluate, is_inexact, operands

_engine = getattr(torch._C, "_autograd", None)


def run(op: FlatOp, tensors: Sequence[Tensor], views: Views = NO_VIEWS) -> tuple[Sequence[Tensor], Any]:
    """Calls `op` on tensors: its outputs, and the tree that they are the leaves of. Differentiable as torch's own
    operators are, to any order, and under torch.func's transforms."""
    if _watch.transforms_active():
        return _run_under_transforms(op, tensors)
    if _watch.is_seen():
        return call(op, tensors)
    if torch.is_grad_enabled():
        mask = tuple([t.requires_grad for t in tensors])
        if True in mask:
            holder = _Holder()
            return _Call.apply(op, mask, views, holder, *tensors), holder.tree
    return evaluate(op, tensors, views)


def _run_under_transforms(op: FlatOp, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
    if _watch.functionalizes():
        return call(op, tensors)
    if _watch.is_traced():
        return call_in_graph(op, tensors)
    holder = _Holder()
    return _Transformed.apply(op, holder, *tensors), holder.tree


class _Holder:
    """Where an autograd.Function leaves what is no tensor."""

    tree: Any


class _Call(torch.autograd.Function):
    """One call of a FlatOp as a node of the graph. It has no setup_context: that costs 10 us a call."""

    @staticmethod
    def forward(ctx, op: FlatOp, mask: Mask, views: Views, holder: _Holder, *tensors):
        arrays = operands(op, tensors, views)
        out, residuals = op.forward(mask)(*arrays)
        outputs = tuple([receive(leaf) for leaf in out.leaves])
        holder.tree = out.tree
        ctx.op, ctx.mask, ctx.views, ctx.plan = op, mask, views, residuals.plan
        ctx.inexact = tuple([is_inexact(o) for o in outputs])
        if False in ctx.inexact:
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
        if torch.is_grad_enabled() or _watch.transforms_active() or _watch.is_seen():
            gradients, _ = run(ctx.op.vjp(ctx.mask), [*saved[:n], *cotangents], ctx.views)
        else:
            gradients = _first_order(ctx, saved[:n], saved[n:], cotangents)
        return (None, None, None, None, *_spread(gradients, ctx.mask))


class _Transformed(torch.autograd.Function):
    """One call under torch.func transforms or in forward mode: each derives another FlatOp, and comes back here."""

    @staticmethod
    def forward(op: FlatOp, holder: _Holder, *tensors):
        outputs, holder.tree = call(op, tensors) if _watch.is_seen() else evaluate(op, tensors)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, _, *tensors = inputs
        ctx.inexact = tuple([is_inexact(o) for o in output])
        ctx.mark_non_differentiable(*[o for o in output if not is_inexact(o)])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        mask = tuple(ctx.needs_input_grad[2:])
        cotangents = [c for c, inexact in zip(cotangents, ctx.inexact, strict=True) if inexact]
        gradients, _ = run(ctx.op.vjp(mask), [*ctx.saved_tensors, *cotangents])
        return (None, None, *_spread(gradients, mask))

    @staticmethod
    def jvp(ctx, *tangents):
        tangents = tangents[2:]
        mask = tuple([t is not None for t in tangents])
        try:
            results, _ = run(ctx.op.jvp(mask), [*ctx.saved_tensors, *[t for t in tangents if t is not None]])
        except TypeError as error:
            error.add_note(
                f"torch_bridge: this was raised while deriving {ctx.op.name} in forward mode, which functions with a "
                "custom_vjp rule do not have. Use reverse mode (torch.func.jacrev)."
            )
            raise
        return tuple(_spread(results, ctx.inexact))

    @staticmethod
    def vmap(info, in_dims, *args):
        op, holder, *tensors = args
        outputs, holder.tree = run(op.vmap(tuple(in_dims[2:])), tensors)
        return tuple(outputs), (0,) * len(outputs)


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


def _spread(values: Sequence[Tensor], mask: Mask) -> list[Tensor | None]:
    """The values, in order, where the mask is set, and None elsewhere."""
    left = iter(values)
    return [next(left) if m else None for m in mask]


def _saved_tensor_hooks_active() -> bool:
    probe = getattr(_engine, "_top_saved_tensors_default_hooks", None)
    return True if probe is None else probe(False) is not None  # unknown: the slower way is right in both cases


def _keeps_graph() -> bool:
    probe = getattr(_engine, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else probe()  # unknown: keep, at the price of memory
