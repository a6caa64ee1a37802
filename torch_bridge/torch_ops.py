"""`torch.ops.jaxsparse`: the products as operators, which graphs, modes and tracers see whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torch_bridge._matrix import ACTIVATIONS, Diagonal, Matrix, Sparse, like
from torch_bridge.products import Multiply, Sample, as_autocast, is_trained

_LIBRARY = torch.library.Library("jaxsparse", "DEF")
_DERIVED = {"multiply": Multiply, "sample": Sample}
_UNCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


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
        if torch.is_grad_enabled() and method in _DERIVED:
            given = _activation(arguments)
            if not given:
                return _DERIVED[method].apply(matrix(*arguments), *arguments[:operands])
            if is_trained(*arguments[:operands]):  # the derivative needs what the activation was applied to
                return ACTIVATIONS[given[0]](called(*arguments[:-1]))
        with torch._C._AutoDispatchBelowAutograd():
            return called(*arguments)

    def cast(*arguments):
        dtype = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_UNCAST):
            return called(*[as_autocast(t, dtype) for t in arguments[:operands]], *arguments[operands:])

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, derived, "Autograd")
    _LIBRARY.impl(name, cast, "AutocastCPU")
    torch.library.register_fake(f"jaxsparse::{name}", shapes, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.jaxsparse, name))(_FLOPS[method])


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
