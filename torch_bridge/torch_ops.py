"""`torch.ops.jaxsparse`: the products as operators, which graphs, modes and tracers see whole."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils.flop_counter import register_flop_formula

from torch_bridge._matrix import ACTIVATIONS, Diagonal, Matrix, Sparse, like
from torch_bridge._watch import transforms_active
from torch_bridge.products import (
    Multiply,
    MultiplyUnderTransforms,
    Sample,
    SampleUnderTransforms,
    as_autocast,
    is_trained,
    tangent,
)

_LIBRARY = torch.library.Library("jaxsparse", "DEF")
_UNCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class _MultiplyByLevels(MultiplyUnderTransforms):
    """As the operator is called by the transform whose turn it is, with the operator for what comes below."""

    @staticmethod
    def forward(matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None, *index: Tensor) -> Tensor:
        with _next_level():
            return _product(matrix.with_index(index), x, w, bias)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        _, dx, dw, db, *_ = tangents
        x, w, *index = ctx.saved_tensors
        return tangent(functools.partial(_product, ctx.matrix.with_index(index)), x, w, dx, dw, db)


class _SampleByLevels(SampleUnderTransforms):
    """The same of `sample`."""

    @staticmethod
    def forward(matrix: Matrix, x: Tensor, dy: Tensor, *index: Tensor) -> Tensor:
        with _next_level():
            return matrix.with_index(index).operator("sample", x, dy)

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        _, dx, ddy, *_ = tangents
        x, dy, *index = ctx.saved_tensors
        return tangent(functools.partial(ctx.matrix.with_index(index).operator, "sample"), x, dy, dx, ddy)


def _product(matrix: Matrix, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return matrix.operator("multiply", x, w, bias, None)


@contextlib.contextmanager
def _next_level() -> Iterator[None]:
    """Where the transform before has its turn; without one, the kernel."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        yield


def _one_level(function: Any) -> Callable[..., Tensor]:
    """`function.apply` for the transform whose turn it is; it would go through all of them."""
    apply = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]

    def applied(*arguments):
        with enable_single_level_autograd_function():
            return apply(*arguments)

    return applied


_DERIVED = {"multiply": Multiply.apply, "sample": Sample.apply}
_DERIVED_UNDER_TRANSFORMS = {"multiply": _one_level(_MultiplyByLevels), "sample": _one_level(_SampleByLevels)}


def _define(schema: str, method: str, operands: int, matrix: Callable[..., Matrix], shapes: Callable[..., Any]) -> None:
    """Makes an operator of a method of matrices.

    Args:
      schema: its name and types, as torch writes them; an activation comes last.
      method: the method, which takes the first `operands` arguments, and the activation.
      matrix: the matrix that the arguments describe.
      shapes: empty results for the arguments.
    """
    name = schema.partition("(")[0]

    def called(*arguments):
        return getattr(torch.ops.jaxsparse, name)(*arguments)

    def kernel(*arguments):
        return getattr(matrix(*arguments), method)(*arguments[:operands], *_activation(arguments))

    def derived(*arguments):
        transforms, given, tensors = transforms_active(), _activation(arguments), arguments[:operands]
        if given and (transforms or is_trained(*tensors)):  # the derivative needs what the activation was applied to
            return ACTIVATIONS[given[0]](called(*arguments[:-1]))
        if method == "gradients" and (transforms or is_trained(*tensors)):
            return apart(matrix(*arguments), *tensors)
        if transforms and method in _DERIVED:
            described = matrix(*arguments)
            return _DERIVED_UNDER_TRANSFORMS[method](described, *tensors, *described.index)
        if torch.is_grad_enabled() and method in _DERIVED and not given:
            return _DERIVED[method](matrix(*arguments), *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return called(*arguments)

    def apart(matrix, x, w, dy):
        return matrix.T.operator("multiply", dy, w, None, None), matrix.operator("sample", x, dy)

    def batched(info, in_dims, *arguments):
        if method == "multiply" and all(d is None for d in in_dims[1:]):
            return called(arguments[0].movedim(in_dims[0], 0), *arguments[1:]), 0  # rows of x are independent
        calls = zip(*[_unbound(a, d, info.batch_size) for a, d in zip(arguments, in_dims, strict=True)], strict=True)
        results = [called(*call) for call in calls]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    def cast(*arguments):
        dtype = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_UNCAST):
            return called(*[as_autocast(t, dtype) for t in arguments[:operands]], *arguments[operands:])

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, derived, "Autograd")
    _LIBRARY.impl(name, cast, "AutocastCPU")
    torch.library.register_vmap(f"jaxsparse::{name}", batched, lib=_LIBRARY)
    torch.library.register_fake(f"jaxsparse::{name}", shapes, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.jaxsparse, name))(_FLOPS[method])


def _unbound(argument: Any, dims: Any, count: int) -> Sequence[Any]:
    """An argument of each call of a batch."""
    if isinstance(dims, (list, tuple)):
        each = [_unbound(a, d, count) for a, d in zip(argument, dims, strict=True)]
        return [list(call) for call in zip(*each, strict=True)]
    return [argument] * count if dims is None else argument.unbind(dims)


def _activation(arguments: Sequence[Any]) -> list[str]:
    """The name of the activation, where there is one: the dispatcher leaves out what has its default value."""
    return [a for a in arguments[-1:] if isinstance(a, str)]


# From the shapes of the arguments and the result: two for every row of x and every stored number.
_FLOPS: dict[str, Callable[..., int]] = {
    "multiply": lambda x, values, *_, out_shape: 2 * math.prod(x[:-1]) * math.prod(values),
    "sample": lambda x, *_, out_shape: 2 * math.prod(x[:-1]) * math.prod(out_shape),
    "gradients": lambda x, values, *_, out_shape: 4 * math.prod(x[:-1]) * math.prod(values),
}


def _sparse(index, sizes, transposed: bool = False, activation: str | None = None) -> Sparse:
    return Sparse(tuple(index), tuple(sizes), transposed)


def _rows(x: Tensor, features: int, out: int) -> Tensor:
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"x of shape {tuple(x.shape)} must have {features} features in its last dimension.")
    return like(x, out)


def _outer(x, dy, num_blocks) -> Diagonal:
    return Diagonal((num_blocks, x.shape[-1] // num_blocks, dy.shape[-1] // num_blocks))


_define(
    "spmm(Tensor x, Tensor values, Tensor? bias, Tensor[] index, int[] sizes, bool transposed, "
    "str? activation=None) -> Tensor",
    "multiply",
    3,
    matrix=lambda x, w, bias, *how: _sparse(*how),
    shapes=lambda x, w, bias, index, sizes, transposed, activation=None: _rows(
        x, sizes[1 if transposed else 0], sizes[0 if transposed else 1]
    ),
)
_define(
    "sddmm(Tensor x, Tensor dy, Tensor[] index, int[] sizes) -> Tensor",
    "sample",
    2,
    matrix=lambda x, dy, *how: _sparse(*how),
    shapes=lambda x, dy, index, sizes: x.new_empty(_sparse(index, sizes).values_shape),
)
_define(
    "spmm_grads(Tensor x, Tensor values, Tensor dy, Tensor[] index, int[] sizes) -> (Tensor, Tensor)",
    "gradients",
    3,
    matrix=lambda x, w, dy, *how: _sparse(*how),
    shapes=lambda x, w, dy, index, sizes: (like(x, sizes[0]), w.new_empty(w.shape)),
)
_define(
    "block_diag_matmul(Tensor x, Tensor blocks, Tensor? bias, bool transposed, str? activation=None) -> Tensor",
    "multiply",
    3,
    matrix=lambda x, w, bias, transposed, activation=None: Diagonal(tuple(w.shape), transposed),
    shapes=lambda x, w, bias, transposed, activation=None: _rows(
        x, *[w.shape[0] * w.shape[k] for k in ((2, 1) if transposed else (1, 2))]
    ),
)
_define(
    "block_diag_outer(Tensor x, Tensor dy, int num_blocks) -> Tensor",
    "sample",
    2,
    matrix=_outer,
    shapes=lambda x, dy, num_blocks: x.new_empty(_outer(x, dy, num_blocks).sizes),
)
