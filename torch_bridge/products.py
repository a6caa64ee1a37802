"""The products of sparse layers on CPU tensors: C++ kernels in torch's own memory, on torch's own threads.

    multiply(matrix, x, w, bias, activation)    activation(x W + bias)
    sample(matrix, x, dy)                       x^T dy where W is stored

Without activation both are linear in each operand and each is the other's derivative, so that gradients of gradients,
in any mode, are the same two again. They are also operators of torch's, `torch.ops.jaxsparse`, which is how graphs hold
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from torch_bridge import _portable, _watch
from torch_bridge._matrix import ACTIVATIONS, WHY_NOT, Diagonal, Matrix, sum_of_rows

_ORDINARY = (Tensor, torch.nn.Parameter)  # whose memory is their own
_LARGE = 2**15  # stored numbers whose gradient takes longer than to ask whether it is wanted
_will_execute = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def is_direct(x: Tensor, w: Tensor, backend: str | None) -> bool:
    """Whether a layer's product goes straight to the kernels. All others go through JAX: those on other devices, those
    whose back end is another by name, and all where `WHY_NOT` is a reason."""
    return x.is_cpu and w.is_cpu and backend in (None, "cpu") and WHY_NOT is None


def is_torchs(matrix: Diagonal, x: Tensor, w: Tensor, backend: str | None) -> bool:
    """Whether a layer's product is torch's own operators and nothing else, under torch.func's transforms too. Graphs
    hold the operator instead, whoever trains."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype != w.dtype or _watch.any_autocast():
        return False
    return matrix.is_torchs(x) and is_direct(x, w, backend)


def goes_to_onnx() -> bool:
    """Whether torch.onnx.export records."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def multiply(matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x W + bias), differentiable in all three.

    The kernel applies the activation to its sums. Where a derivative is to follow, which needs what it was applied to,
    torch does.

    Args:
      x: [..., in], or [..., out] where the matrix is transposed.
      w: the stored values, [nnzb, i, o], or [nnz] for single entries.
      bias: one number per output.
      activation: one of `ACTIVATIONS`, or None.
    Raises:
      ValueError: for shapes or dtypes that do not fit, and for an index out of range.
    """
    compiles = torch.compiler.is_compiling()  # transforms as well, and operators have rules for them
    transforms = not compiles and _watch.transforms_active() and not _watch.functionalizes()
    if not transforms and _is_recorded():  # before the next line: what is recorded does not depend on who trains
        if torch.onnx.is_in_onnx_export():
            return _portable.multiply(matrix, x, w, bias, activation)
        return matrix.operator("multiply", x, w, bias, activation)
    if activation and (transforms or is_trained(x, w, bias)):
        return ACTIVATIONS[activation](multiply(matrix, x, w, bias))
    if transforms:
        return MultiplyUnderTransforms.apply(matrix, x, w, bias, *matrix.index)
    if isinstance(matrix, Diagonal) and matrix.is_torchs(x):
        y = matrix.by_torch(x, w, bias)
        return ACTIVATIONS[activation](y) if activation else y
    if torch.is_grad_enabled() and not activation:
        return _apply_multiply(
            matrix, unwrap_if_dead(x), unwrap_if_dead(w), bias if bias is None else unwrap_if_dead(bias)
        )
    return _raw(matrix, "multiply", x, w, bias, activation)


def is_trained(*operands: Tensor | None) -> bool:
    """Whether a derivative by one of them may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def as_autocast(t: Tensor | None, dtype: torch.dtype) -> Any:
    """An operand as `torch.nn.functional.linear` takes it under torch.autocast."""
    return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)


def sample(matrix: Matrix, x: Tensor, dy: Tensor) -> Tensor:
    """x^T dy, summed over all leading dimensions, where the matrix stores it; differentiable in both."""
    if _watch.transforms_active() and not _watch.functionalizes():
        return SampleUnderTransforms.apply(matrix, x, dy, *matrix.index)
    if _is_recorded():
        return matrix.operator("sample", x, dy)
    if torch.is_grad_enabled():
        return Sample.apply(matrix, x, dy)
    return _raw(matrix, "sample", x, dy)


# ---- rules -----------------------------------------------------------------------------------------------


# y = xW + b gives dx = dy W^T, dW = x^T dy where W is stored, db = the sum of dy over rows.
def _multiply_backward(matrix: Matrix, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]):
    if torch.is_grad_enabled() or _watch.transforms_active():  # these gradients have derivatives of their own
        for_x, for_w, for_bias = wanted
        dx = multiply(matrix.T, dy, w) if for_x else None
        return dx, sample(matrix, x, dy) if for_w else None, sum_of_rows(dy) if for_bias else None
    return _raw(matrix, "backward", x, w, dy, wanted)


# g = sample(x, dy) with the cotangent G, itself the values of such a matrix: dx = dy G^T and d(dy) = x G.
def _sample_backward(matrix: Matrix, x: Tensor, dy: Tensor, g: Tensor, wanted: Sequence[bool]):
    return multiply(matrix.T, dy, g) if wanted[0] else None, multiply(matrix, x, g) if wanted[1] else None


class Multiply(torch.autograd.Function):
    """`multiply` as a node of the graph. It has no setup_context: that costs 20 us a call."""

    @staticmethod
    def forward(ctx, matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x, w, *matrix.index)
        return _raw(matrix, "multiply", x, w, bias, None)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        (dy,), (x, w, *index) = cotangents, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:] if w.numel() < _LARGE else _asked_for(ctx)
        return None, *_multiply_backward(ctx.matrix.with_index(index), x, w, dy, wanted)


# What `Multiply.apply` comes to outside of torch.func: half of its time is spent on finding that out. Tensors that have
# outlived a transform are taken out of their wrappers, as it does.
_apply_multiply = super(torch.autograd.Function, Multiply).apply  # pyright: ignore[reportAttributeAccessIssue]


def _asked_for(ctx) -> tuple[bool, ...]:
    """Which gradients the backward pass that runs has a use for: `autograd.grad(y, x)` has none for a weight's, which
    `ctx.needs_input_grad` does not say. To find out takes microseconds."""
    following = iter(ctx.next_functions)  # of tensors only
    nodes = [next(following, (None, 0))[0] for _ in ctx.needs_input_grad[1:]]
    return tuple([node is not None and _is_executed(node) for node in nodes])


def _is_executed(node: Any) -> bool:
    try:
        return _will_execute(node)
    except RuntimeError:  # a leaf whose gradient is returned, or an engine that does not tell
        return True


class Sample(torch.autograd.Function):
    """`sample` as a node of the graph."""

    @staticmethod
    def forward(ctx, matrix: Matrix, x: Tensor, dy: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x, dy, *matrix.index)
        return _raw(matrix, "sample", x, dy)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        (g,), (x, dy, *index) = cotangents, ctx.saved_tensors
        return None, *_sample_backward(ctx.matrix.with_index(index), x, dy, g, ctx.needs_input_grad[1:])


# ---- torch.func and forward mode -----------------------------------------------------------------------


class MultiplyUnderTransforms(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
        return _raw(matrix.with_index(index), "multiply", x, w, bias, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.matrix, x, w, bias, *index = inputs
        ctx.save_for_backward(x, w, *index)
        ctx.save_for_forward(x, w, *index)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        (dy,), (x, w, *index) = cotangents, ctx.saved_tensors
        gradients = _multiply_backward(ctx.matrix.with_index(index), x, w, dy, ctx.needs_input_grad[1:4])
        return None, *gradients, *[None] * len(index)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        _, dx, dw, db, *_ = tangents
        x, w, *index = ctx.saved_tensors
        return tangent(functools.partial(multiply, ctx.matrix.with_index(index)), x, w, dx, dw, db)

    @staticmethod
    def vmap(info, in_dims, *args):
        matrix, x, w, bias, *index = args
        if all(d is None for d in in_dims[2:]):  # rows of x are independent: those of the batch are more of them
            return multiply(matrix.with_index(index), x.movedim(in_dims[1], 0), w, bias), 0
        calls = _calls(info, in_dims[1:], (x, w, bias, *index))
        return torch.stack([multiply(matrix.with_index(index), x, w, bias) for x, w, bias, *index in calls]), 0


class SampleUnderTransforms(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Matrix, x: Tensor, dy: Tensor, *index: Tensor) -> Tensor:
        return _raw(matrix.with_index(index), "sample", x, dy)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.matrix, x, dy, *index = inputs
        ctx.save_for_backward(x, dy, *index)
        ctx.save_for_forward(x, dy, *index)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        (g,), (x, dy, *index) = cotangents, ctx.saved_tensors
        gradients = _sample_backward(ctx.matrix.with_index(index), x, dy, g, ctx.needs_input_grad[1:3])
        return None, *gradients, *[None] * len(index)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        _, dx, ddy, *_ = tangents
        x, dy, *index = ctx.saved_tensors
        return tangent(functools.partial(sample, ctx.matrix.with_index(index)), x, dy, dx, ddy)

    @staticmethod
    def vmap(info, in_dims, *args):
        matrix, *operands = args
        calls = _calls(info, in_dims[1:], operands)
        return torch.stack([sample(matrix.with_index(index), x, dy) for x, dy, *index in calls]), 0


def tangent(product: Callable[..., Tensor], a: Tensor, b: Tensor, da, db, dbias: Tensor | None = None) -> Tensor:
    """Of product(a, b) + bias, by the tangents that there are."""
    terms = [] if da is None else [product(da, b)]
    terms += [] if db is None else [product(a, db)]
    terms += [] if dbias is None else [dbias.expand(*a.shape[:-1], -1)]
    return sum(terms[1:], terms[0])


def _calls(info, dims: Sequence[int | None], operands: Sequence[Tensor | None]) -> list[list[Any]]:
    """The operands of each call of a batch."""
    split = [
        [t] * info.batch_size if t is None or d is None else t.unbind(d) for t, d in zip(operands, dims, strict=True)
    ]
    return [list(call) for call in zip(*split, strict=True)]


# ---- where a call goes -----------------------------------------------------------------------------------


def _raw(matrix: Matrix, name: str, *operands) -> Any:
    """A product without derivatives: the kernel, or the operator where a mode or a subclass of Tensor looks on, or
    where there are shapes alone."""
    x, w, *_ = operands
    if torch._C._len_torch_dispatch_stack() or type(x) not in _ORDINARY or type(w) not in _ORDINARY or x.is_meta:
        return _backward_by_operators(matrix, *operands) if name == "backward" else matrix.operator(name, *operands)
    try:
        return getattr(matrix, name)(*operands)
    except RuntimeError as error:
        if not any(is_legacy_batchedtensor(t) for t in operands if isinstance(t, Tensor)):
            raise
        raise RuntimeError(
            "autograd.grad(is_grads_batched=True) makes tensors without memory of their own, which the kernels can't "
            "read; torch.func.vmap and jacrev work."
        ) from error


def _backward_by_operators(matrix: Matrix, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]):
    for_x, for_w, for_bias = wanted
    db = sum_of_rows(dy) if for_bias else None
    if for_x and for_w and matrix.fuses_gradients:
        return *matrix.operator("gradients", x, w, dy), db
    dx = matrix.T.operator("multiply", dy, w, None, None) if for_x else None
    return dx, matrix.operator("sample", x, dy) if for_w else None, db


def _is_recorded() -> bool:
    return torch.compiler.is_compiling() or _watch.is_seen() or _watch.functionalizes()
