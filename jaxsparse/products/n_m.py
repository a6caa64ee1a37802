"""The products with a matrix W of which n of every m neighbouring inputs are stored.

    n_m_spmm   activation(x W + bias)
    n_m_sddmm  x^T dy where W is stored: what the gradient of the other by W is

All leading dimensions of x and dy are rows. One operand, `bits`, says where W is stored; `n`, `m` and `shape` are those
of W as it is stored, and `transposed` puts W^T for W. Each is stated in the same order as in `sparse`.
"""

from __future__ import annotations

import functools
from typing import Any

from jax.interpreters import ad, batching

from jaxsparse import _backends
from jaxsparse.products._epilogue import bilinear_then_finished, refuse_epilogue
from jaxsparse.products._rules import (
    Product,
    batch_rows,
    is_unknown,
    is_zero,
    linear_in_each,
    loop,
    multiply_adds,
    returned,
    rows,
    sample_transposed,
    workload,
)
from jaxsparse.products._shards import Shards


def spmm(x, w, index, bias=None, *, activation: str | None = None, transposed: bool = False, **how):
    """activation(x W + bias), or of x W^T."""
    return _spmm(x, w, *index, bias, activation=activation, transposed=transposed, **how)


def sddmm(x, dy, index, *, transposed: bool = False, **how):
    """x^T dy where W is stored, or where W^T is; the values are as W stores them."""
    return _sample(x, dy, *index, transposed=transposed, **how)


def _work(op: str, x, n: int, m: int):
    return workload(op, x, (m, 1), n, m)


# ---- n_m_spmm: activation(x W + bias) -------------------------------------------------------------------


def _spmm_shapes(x, *_, shape, transposed, **how):
    return [(*x.shape[:-1], shape[0 if transposed else 1])]


def _spmm_kernel(platform, *, n, m, backend, **options):
    def run(x, w, bits, *bias):
        kernel = _backends.kernel(_work("n_m_spmm", x, n, m), backend, platform)
        y = kernel(rows(x), w, bits, *bias, n=n, m=m, **options)
        return y.reshape(*x.shape[:-1], y.shape[1])

    return run


# y = x W is linear in each: of the cotangent dy, x gets dy W^T and W gets x^T dy where it is stored.
def _spmm_transpose(dy, x, w, bits, *bias, activation, transposed, **how):
    refuse_epilogue(activation, [is_unknown(b) for b in bias])
    count = 3 + len(bias)
    if is_zero(dy):
        return returned(count)
    if is_unknown(x):
        return returned(count, {0: _spmm(dy, w, bits, activation=None, transposed=not transposed, **how)})
    return returned(count, {1: _sample(x, dy, bits, transposed=transposed, **how)})


_spmm = Product(
    "n_m_spmm",
    shapes=_spmm_shapes,
    kernel=_spmm_kernel,
    shards=Shards(("B.",), ("B.",)),
    flops=lambda operands, _: multiply_adds(operands[0], operands[1]),
)
ad.primitive_jvps[_spmm] = bilinear_then_finished(_spmm, 1)
ad.primitive_transposes[_spmm] = _spmm_transpose
batch_rows(_spmm, [0])


# ---- n_m_sddmm: x^T dy where W is stored ----------------------------------------------------------------


def _sample(x, dy, bits, *, transposed: bool, **how: Any):
    if transposed:  # (x^T dy)^T = dy^T x
        x, dy = dy, x
    return _sddmm(x, dy, bits, **how)


def _sddmm_shapes(x, dy, bits, *, n, **how):
    return [(bits.shape[0], n, bits.shape[1])]


def _sddmm_kernel(platform, *, n, m, backend, **options):
    def run(x, dy, bits):
        kernel = _backends.kernel(_work("n_m_sddmm", x, n, m), backend, platform)
        return kernel(rows(x), rows(dy), bits, n=n, m=m, **options)

    return run


_sddmm = Product(
    "n_m_sddmm",
    shapes=_sddmm_shapes,
    kernel=_sddmm_kernel,
    shards=Shards(("B.", "B."), ("",)),
    flops=lambda operands, results: multiply_adds(operands[0], results[0]),
)
ad.primitive_jvps[_sddmm] = linear_in_each(_sddmm)
ad.primitive_transposes[_sddmm] = sample_transposed(_spmm)
batching.primitive_batchers[_sddmm] = lambda a, dims, **how: loop(functools.partial(_sddmm, **how), a, dims)
