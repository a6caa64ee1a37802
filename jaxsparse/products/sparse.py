"""The products with a sparse matrix W, stored as blocks or as single entries.

    spmm          activation(x W + bias)
    sddmm         x^T dy where W is stored: what spmm's gradient by W is
    spmm_tangent  dx W + x dW: what changes of x and W do to x W
    spmm_grads    (dy W^T, sddmm(x, dy)): both gradients of spmm, for kernels that read dy once for the two

All leading dimensions of x and dy are rows. Five operands say where W is stored (`Index`); `shape` and `block` are
those of W as it is stored, and `transposed` puts W^T for W. Each is stated below in the same order: the shapes of its
results, its kernel, its tangent, its transposes, and, where it is declared, how it shards and batches.
"""

from __future__ import annotations

import functools
from typing import Any

from jax.interpreters import ad, batching, partial_eval

from jaxsparse import _backends
from jaxsparse._indices import Index
from jaxsparse._sizes import is_unstructured, values_shape
from jaxsparse.products._epilogue import finished, refuse_epilogue
from jaxsparse.products._rules import (
    Product,
    batch_as,
    batch_rows,
    is_unknown,
    is_zero,
    jvp_of,
    linear_in_each,
    loop,
    multiply_adds,
    returned,
    rows,
    sample_transposed,
    workload,
)
from jaxsparse.products._shards import Shards

_N = len(Index._fields)


def spmm(x, w, index: Index, bias=None, *, activation: str | None = None, transposed: bool = False, **how):
    """activation(x W + bias), or of x W^T."""
    return _spmm(x, w, *index, bias, activation=activation, transposed=transposed, **how)


def sddmm(x, dy, index: Index, *, transposed: bool = False, **how):
    """x^T dy where W is stored, or where W^T is; the values are as W stores them."""
    return _sample(x, dy, index, transposed, how)


def _work(op: str, x, index, block, options):
    stored = index[1].shape[0] * block[0] * block[1]
    return workload(op, x, block, stored, options["shape"][0] * options["shape"][1])


# ---- spmm: activation(x W + bias) -----------------------------------------------------------------------


def _spmm_shapes(x, w, *_, shape, transposed, **how):
    return [(*x.shape[:-1], shape[0 if transposed else 1])]


def _spmm_kernel(platform, *, block, backend, **options):
    def run(x, w, *rest):
        kernel = _backends.kernel(_work("spmm", x, rest, block, options), backend, platform)
        y = kernel(rows(x), w, Index(*rest[:_N]), *rest[_N:], block=block, **options)
        return y.reshape(*x.shape[:-1], y.shape[1])

    return run


def _spmm_jvp(primals, tangents, *, activation, **how):
    (x, w, *index), (tx, tw) = primals[: 2 + _N], tangents[:2]
    z, linear = _spmm(*primals, activation=None, **how), {"activation": None, **how}
    if not is_zero(tx) and not is_zero(tw):
        terms = [_tangent(tx, tw, x, w, *index, **how)]
    else:
        terms = [_spmm(*pair, *index, **linear) for pair, t in (((tx, w), tx), ((x, tw), tw)) if not is_zero(t)]
    return finished(activation, z, terms, tangents[2 + _N :])


# y = x W is linear in each: of the cotangent dy, x gets dy W^T and W gets x^T dy where it is stored.
def _spmm_transpose(dy, x, w, *rest, activation, transposed, **how):
    refuse_epilogue(activation, [is_unknown(b) for b in rest[_N:]])
    index, count = rest[:_N], 2 + len(rest)
    if is_zero(dy):
        return returned(count)
    if is_unknown(x):
        return returned(count, {0: _spmm(dy, w, *index, activation=None, transposed=not transposed, **how)})
    return returned(count, {1: _sample(x, dy, index, transposed, how)})


_spmm = Product(
    "spmm",
    shapes=_spmm_shapes,
    kernel=_spmm_kernel,
    shards=Shards(("B.",), ("B.",)),
    flops=lambda operands, _: multiply_adds(operands[0], operands[1]),
)
ad.primitive_jvps[_spmm] = _spmm_jvp
ad.primitive_transposes[_spmm] = _spmm_transpose
batch_rows(_spmm, [0])


# ---- sddmm: x^T dy where W is stored --------------------------------------------------------------------


def _sample(x, dy, index, transposed: bool, how: dict[str, Any]):
    if transposed:  # (x^T dy)^T = dy^T x
        x, dy = dy, x
    return _sddmm(x, dy, *index, **how)


def _sddmm_shapes(x, dy, col_ptr, row_index, *_, block, **how):
    return [values_shape(row_index.shape[0], block)]


def _sddmm_kernel(platform, *, block, backend, **options):
    def run(x, dy, *index):
        kernel = _backends.kernel(_work("sddmm", x, index, block, options), backend, platform)
        return kernel(rows(x), rows(dy), Index(*index), block=block, **options)

    return run


_sddmm = Product(
    "sddmm",
    shapes=_sddmm_shapes,
    kernel=_sddmm_kernel,
    shards=Shards(("B.", "B."), ("",)),
    flops=lambda operands, results: multiply_adds(operands[0], results[0]),
)
ad.primitive_jvps[_sddmm] = linear_in_each(_sddmm)
ad.primitive_transposes[_sddmm] = sample_transposed(_spmm)
batching.primitive_batchers[_sddmm] = lambda a, dims, **how: loop(functools.partial(_sddmm, **how), a, dims)


# ---- spmm_tangent: dx W + x dW --------------------------------------------------------------------------


def _tangent_in_two(tx, tw, x, w, *index, **how):
    return _spmm(tx, w, *index, activation=None, **how) + _spmm(x, tw, *index, activation=None, **how)


def _tangent_kernel(platform, **options):
    multiply = _spmm_kernel(platform, activation=None, **options)
    return lambda tx, tw, x, w, *index: multiply(tx, w, *index) + multiply(x, tw, *index)


# Linear in the pair of changes, and of the cotangent dy they get the gradients of spmm. Those of single entries are one
# product, where both are wanted.
def _tangent_transpose(dy, tx, tw, x, w, *index, transposed, **how):
    for_x, for_w = is_unknown(tx), is_unknown(tw)
    if is_zero(dy):
        return returned(4 + _N)
    if for_x and for_w and is_unstructured(how["block"]) and not transposed:
        return returned(4 + _N, dict(enumerate(_grads(x, dy, w, *index, **how))))
    found = {}
    if for_x:
        found[0] = _spmm(dy, w, *index, activation=None, transposed=not transposed, **how)
    if for_w:
        found[1] = _sample(x, dy, index, transposed, how)
    return returned(4 + _N, found)


_tangent = Product(
    "spmm_tangent",
    shapes=lambda tx, *_, **how: _spmm_shapes(tx, *_, **how),
    kernel=_tangent_kernel,
    shards=Shards(("B.", "", "B."), ("B.",)),
    flops=lambda operands, _: 2 * multiply_adds(operands[2], operands[3]),
)
ad.primitive_jvps[_tangent] = jvp_of(_tangent_in_two)
ad.primitive_transposes[_tangent] = _tangent_transpose
batch_as(_tangent, _tangent_in_two)


# ---- spmm_grads: (dy W^T, x^T dy where W is stored) -----------------------------------------------------


def _grads_in_two(x, dy, w, *index, **how):
    return [_spmm(dy, w, *index, activation=None, transposed=True, **how), _sddmm(x, dy, *index, **how)]


def _grads_kernel(platform, *, block, backend, **options):
    def run(x, dy, w, *index):
        kernel = _backends.kernel(_work("spmm_grads", x, index, block, options), backend, platform)
        dx, dw = kernel(rows(x), rows(dy), w, Index(*index), block=block, **options)
        return [dx.reshape(x.shape), dw]

    return run


# (a, G), the cotangents of (dy W^T, x^T dy): dy gets a W + x G, which is the tangent; x and W as from each alone.
def _grads_transpose(cotangents, x, dy, w, *index, **how):
    a, g = cotangents
    count, linear = 3 + _N, {"activation": None, **how}
    if is_unknown(x):
        return returned(count, {} if is_zero(g) else {0: _spmm(dy, g, *index, transposed=True, **linear)})
    if is_unknown(w):
        return returned(count, {} if is_zero(a) else {2: _sddmm(a, dy, *index, **how)})
    if not is_zero(a) and not is_zero(g):
        return returned(count, {1: _tangent(a, g, x, w, *index, transposed=False, **how)})
    if is_zero(a) and is_zero(g):
        return returned(count)
    pair = (x, g) if is_zero(a) else (a, w)
    return returned(count, {1: _spmm(*pair, *index, transposed=False, **linear)})


def _grads_without_unused(used, *of_inputs_and_equation):
    """The one product that is wanted: a program often drops a gradient only after both were asked for."""
    equation = of_inputs_and_equation[-1]  # since JAX 0.12 which inputs are alive comes before it
    (x, dy, w, *index), params = equation.invars, equation.params
    if all(used):
        return [True] * len(equation.invars), equation
    if not any(used):
        return [False] * len(equation.invars), None
    if used[0]:
        alone = {"activation": None, "transposed": True, **params}
        new = equation.replace(primitive=_spmm, invars=[dy, w, *index], outvars=equation.outvars[:1], params=alone)
        return [False, True, True, *[True] * _N], new
    new = equation.replace(primitive=_sddmm, invars=[x, dy, *index], outvars=equation.outvars[1:])
    return [True, True, False, *[True] * _N], new


_grads = Product(
    "spmm_grads",
    shapes=lambda x, dy, w, *_, **how: [x.shape, w.shape],
    kernel=_grads_kernel,
    shards=Shards(("B.", "B."), ("B.", "")),
    flops=lambda operands, _: 2 * multiply_adds(operands[0], operands[2]),
    several=True,
)
ad.primitive_jvps[_grads] = jvp_of(_grads_in_two)
ad.primitive_transposes[_grads] = _grads_transpose
batch_as(_grads, _grads_in_two)
partial_eval.dce_rules[_grads] = _grads_without_unused
