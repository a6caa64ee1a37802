"""The portable back end: the Triton dialect of Pallas, for blocks of 16 and more on GPUs since Ampere.

A back end: plain 2-D arrays in and out, sums in float32, one rounding to the dtype of `x` after bias and
activation. `precision` is that of `jax.lax.dot`: left out, float32 runs on tensor cores as tf32; "highest" is
exact. Upstream deprecates the dialect since JAX 0.11; nothing outside this folder knows it.
"""

import jax.numpy as jnp

from pallas_kernels._device import why_no_gpu
from pallas_kernels._epilogue import empty
from pallas_kernels._lines import diagonal, entries_of, lines_of

__all__ = ["block_diag_matmul", "block_diag_outer", "sddmm", "spmm", "spmm_grads", "why_not", "why_not_written"]

_DTYPES = ("float32", "bfloat16", "float16")


def why_not(op: str, dtype, block: tuple[int, int], platform: str) -> str | None:
    """Returns why `op` can't run on such arrays here, or None when it can."""
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        return f"dtype {name} is not one of {', '.join(_DTYPES)}"
    if "block_diag" not in op and min(block) < 16:
        return f"a block of {tuple(block)} fills only a part of the smallest tile of a tensor core, 16 x 16"
    return why_not_written(op, block) or why_no_gpu(platform, (8, 0))


def why_not_written(op: str, block: tuple[int, int]) -> str | None:
    """Returns why there is no kernel, wherever it should run."""
    if op == "spmm_grads" or ("block_diag" not in op and tuple(block) == (1, 1)):
        return "there is no kernel for single entries: on a GPU it is faster to expand them and to multiply densely"
    return None


def spmm(
    x,
    blocks,
    index,
    bias=None,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
    interpret: bool = False,
):
    """Multiplies x [m, in] by W to [m, out], or, transposed, x [m, out] by W^T to [m, in]."""
    out = shape[0 if transposed else 1]
    if 0 in (x.shape[0], blocks.shape[0]):
        return empty(x.shape[0], out, bias, activation, x.dtype)
    from pallas_kernels.triton import kernels  # Pallas takes longer to import than the rest of this package

    how = {"activation": activation, "precision": precision, "interpret": interpret}
    return kernels.gather(x, blocks, lines_of(index, transposed), bias, out=out, transposed=transposed, **how)


def sddmm(x, dy, index, *, shape: tuple[int, int], block: tuple[int, int], precision=None, interpret: bool = False):
    """Returns the blocks of x^T dy that W stores, for x [m, in] and dy [m, out]."""
    values = index.row_index.shape[0], *block
    if 0 in (x.shape[0], values[0]):
        return jnp.zeros(values, x.dtype)
    from pallas_kernels.triton import kernels

    return kernels.sample(x, dy, entries_of(index), block, precision=precision, interpret=interpret)


def spmm_grads(x, dy, blocks, index, *, shape, block, precision=None, interpret: bool = False):
    """Refuses, as `why_not` says: the gradients of blocks are `spmm` and `sddmm`."""
    raise NotImplementedError(why_not_written("spmm_grads", block))


def block_diag_matmul(
    x,
    blocks,
    bias=None,
    *,
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
    interpret: bool = False,
):
    """Multiplies slice n of x [m, n*i] by block n to [m, n*o]; transposed, [m, n*o] to [m, n*i]."""
    n, i, o = blocks.shape
    how = {"transposed": transposed, "activation": activation, "precision": precision, "interpret": interpret}
    return spmm(x, blocks, diagonal(n), bias, shape=(n * i, n * o), block=(i, o), **how)


def block_diag_outer(x, dy, num_blocks: int, *, precision=None, interpret: bool = False):
    """Returns the n products [i, o] of the slices of x [m, n*i] and dy [m, n*o]."""
    shape = x.shape[1], dy.shape[1]
    block = x.shape[1] // num_blocks, dy.shape[1] // num_blocks
    how = {"precision": precision, "interpret": interpret}
    return sddmm(x, dy, diagonal(num_blocks), shape=shape, block=block, **how)
