"""The portable back end: Pallas' Triton dialect, for single entries and blocks of 16 and more, on GPUs since Ampere.

A back end: plain 2-D arrays in and out, sums in float32, one rounding to the dtype of `x` after bias and
activation. `precision` is that of `jax.lax.dot`: left out, blocks of float32 run on tensor cores as tf32; "highest"
is exact, as single entries always are. Upstream deprecates the dialect since JAX 0.11; nothing outside this folder
knows it.
"""

import jax.numpy as jnp

from pallas_kernels._device import why_no_gpu
from pallas_kernels._epilogue import empty
from pallas_kernels._lines import diagonal, entries_of, lines_of

__all__ = ["block_diag_matmul", "block_diag_outer", "sddmm", "spmm", "spmm_grads", "why_not"]

_DTYPES = ("float32", "bfloat16", "float16")


def why_not(op: str, dtype, block: tuple[int, int], platform: str, elsewhere: bool = False) -> str | None:
    """Returns why `op` can't run on such arrays here, or `elsewhere` on some machine, or None when it can."""
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        return f"dtype {name} is not one of {', '.join(_DTYPES)}"
    if "block_diag" not in op and tuple(block) != (1, 1) and min(block) < 16:
        return f"a block of {tuple(block)} fills only a part of the smallest tile of a tensor core, 16 x 16"
    return why_no_gpu(platform, elsewhere, (8, 0))


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
    from pallas_kernels.triton import entries, kernels  # Pallas takes longer to import than the rest of this package

    lines, how = lines_of(index, transposed), {"activation": activation, "interpret": interpret}
    if blocks.ndim == 1:
        return entries.gather(x, blocks, lines if transposed else lines._replace(slot=None), bias, **how)
    return kernels.gather(x, blocks, lines, bias, out=out, transposed=transposed, precision=precision, **how)


def sddmm(x, dy, index, *, shape: tuple[int, int], block: tuple[int, int], precision=None, interpret: bool = False):
    """Returns the blocks of x^T dy that W stores, for x [m, in] and dy [m, out]."""
    nnzb, single = index.row_index.shape[0], tuple(block) == (1, 1)
    if 0 in (x.shape[0], nnzb):
        return jnp.zeros((nnzb,) if single else (nnzb, *block), x.dtype)
    from pallas_kernels.triton import entries, kernels

    if single:
        return entries.sample(x, dy, lines_of(index, False), interpret=interpret)
    return kernels.sample(x, dy, entries_of(index), block, precision=precision, interpret=interpret)


def spmm_grads(x, dy, blocks, index, *, shape, block, precision=None, interpret: bool = False):
    """Returns (dy W^T, the blocks of x^T dy that W stores), each by its own kernel."""
    how = {"shape": shape, "block": block, "precision": precision, "interpret": interpret}
    return spmm(dy, blocks, index, transposed=True, **how), sddmm(x, dy, index, **how)


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
    return sddmm(x, dy, diagonal(num_blocks), shape=shape, block=block, **how).reshape(num_blocks, *block)
