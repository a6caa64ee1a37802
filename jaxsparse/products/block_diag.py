"""The products with a block-diagonal matrix W of n blocks [i, o]: slice n of a row meets block n only.

    block_diag_matmul  activation(x W + bias)
    block_diag_outer   the diagonal blocks of x^T dy: what the gradient of the other by W is

All leading dimensions of x and dy are rows. `transposed` puts W^T for W. Each is stated in the same order as in
`sparse`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxsparse import _backends
from jaxsparse.products._epilogue import bilinear_then_finished, refuse_epilogue
from jaxsparse.products._rules import (
    Product,
    is_unknown,
    is_zero,
    linear_in_each,
    multiply_adds,
    returned,
    rows,
    sample_transposed,
    workload,
)
from jaxsparse.products._shards import Shards


def block_diag_matmul(x, w, bias=None, *, activation: str | None = None, transposed: bool = False, **how):
    """activation(x W + bias), or of x W^T."""
    return _matmul(x, w, bias, activation=activation, transposed=transposed, **how)


def _work(op: str, x, n: int, i: int, o: int):
    return workload(op, x, (i, o), n * i * o, n * i * n * o)


# ---- block_diag_matmul ----------------------------------------------------------------------------------


def _matmul_shapes(x, w, *_, transposed, **how):
    n, i, o = w.shape
    return [(*x.shape[:-1], n * (i if transposed else o))]


def _matmul_kernel(platform, *, backend, **options):
    def run(x, w, *bias):
        kernel = _backends.kernel(_work("block_diag_matmul", x, *w.shape), backend, platform)
        y = kernel(rows(x), w, *bias, **options)
        return y.reshape(*x.shape[:-1], y.shape[1])

    return run


# Linear in each: of the cotangent dy, x gets dy W^T, and W the blocks of x^T dy, or of dy^T x where it is transposed.
def _matmul_transpose(dy, x, w, *bias, activation, transposed, **how):
    refuse_epilogue(activation, [is_unknown(b) for b in bias])
    count = 2 + len(bias)
    if is_zero(dy):
        return returned(count)
    if is_unknown(x):
        return returned(count, {0: _matmul(dy, w, activation=None, transposed=not transposed, **how)})
    pair = (dy, x) if transposed else (x, dy)
    return returned(count, {1: _outer(*pair, num_blocks=w.aval.shape[0], block=w.aval.shape[1:], **how)})


# A batch of x alone is more rows; a batch of matrices is one matrix of more blocks.
def _matmul_batched(operands, dims, **how):
    x, w, *bias = operands
    if all(d is None for d in dims[1:]):
        return _matmul(jnp.moveaxis(x, dims[0], 0), w, *bias, **how), 0
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    w, *bias = (_batch_first(a, d, size) for a, d in zip(operands[1:], dims[1:], strict=True))
    joined = (a.reshape(size * a.shape[1], *a.shape[2:]) for a in (w, *bias))
    y = _matmul(_side_by_side(x, dims[0], size), *joined, **how)
    return y.reshape(*y.shape[:-1], size, y.shape[-1] // size), y.ndim - 1


_matmul = Product(
    "block_diag_matmul",
    shapes=_matmul_shapes,
    kernel=_matmul_kernel,
    shards=Shards(("Bn", "n..", "n"), ("Bn",)),
    flops=lambda operands, _: multiply_adds(operands[0], operands[1]),
)
ad.primitive_jvps[_matmul] = bilinear_then_finished(_matmul, 0)
ad.primitive_transposes[_matmul] = _matmul_transpose
batching.primitive_batchers[_matmul] = _matmul_batched


# ---- block_diag_outer -----------------------------------------------------------------------------------


def _outer_shapes(x, dy, *, num_blocks, block, **how):
    return [(num_blocks, *block)]


def _outer_kernel(platform, *, num_blocks, block, backend, precision):
    def run(x, dy):
        here = x.shape[-1] // block[0] if block[0] else num_blocks  # a device may have a share of them
        kernel = _backends.kernel(_work("block_diag_outer", x, here, *block), backend, platform)
        return kernel(rows(x), rows(dy), num_blocks=here, precision=precision)

    return run


def _matmul_of_sample(x, w, *, num_blocks, block, **how):
    return _matmul(x, w, **how)  # which reads the sizes from w


def _outer_batched(operands, dims, *, num_blocks, **how):
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    x, dy = (_side_by_side(a, d, size) for a, d in zip(operands, dims, strict=True))
    blocks = _outer(x, dy, num_blocks=size * num_blocks, **how)
    return blocks.reshape(size, num_blocks, *blocks.shape[1:]), 0


_outer = Product(
    "block_diag_outer",
    shapes=_outer_shapes,
    kernel=_outer_kernel,
    shards=Shards(("Bn", "Bn"), ("n..",)),
    flops=lambda operands, results: multiply_adds(operands[0], results[0]),
)
ad.primitive_jvps[_outer] = linear_in_each(_outer)
ad.primitive_transposes[_outer] = sample_transposed(_matmul_of_sample)
batching.primitive_batchers[_outer] = _outer_batched


def _batch_first(a, dim: int | None, size: int):
    return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)


def _side_by_side(x, dim: int | None, size: int):
    """The rows of a whole batch [size, ..., features] next to each other, [..., size * features]."""
    x = jnp.moveaxis(_batch_first(x, dim, size), 0, -2)
    return x.reshape(*x.shape[:-2], size * x.shape[-1])
