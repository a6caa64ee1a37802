"""The back end for Hopper GPUs: the Mosaic dialect of Pallas, for bfloat16 and float16 and blocks of 16, 32 or n x 64.

A back end: plain 2-D arrays in and out, sums in float32, one rounding to the dtype of `x` after bias and
activation. Batches and matrices of any size: what is no whole tile is padded here. `precision` is taken for the
contract's sake: products of half numbers are exact in float32.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._device import describe, why_no_gpu
from pallas_kernels._epilogue import empty
from pallas_kernels._lines import diagonal, lines_of

__all__ = ["block_diag_matmul", "block_diag_outer", "sddmm", "spmm", "spmm_grads", "why_not"]

_DTYPES = ("bfloat16", "float16")
_OLDEST_JAX = (0, 11, 2)


def why_not(op: str, dtype, block: tuple[int, int], platform: str, elsewhere: bool = False) -> str | None:
    """Returns why `op` can't run on such arrays here, or `elsewhere` on some machine, or None when it can."""
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        return f"dtype {name} is not one of {', '.join(_DTYPES)}"
    if op == "spmm_grads" or any(side not in (16, 32) and side % 64 for side in block):
        return f"blocks of {tuple(block)} don't fit its tiles: each side must be 16, 32 or a multiple of 64"
    if jax.__version_info__ < _OLDEST_JAX:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, _OLDEST_JAX))}; it needs Python 3.12 or newer"
    return why_no_gpu(platform, elsewhere, (9, 0), (9, 0))


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
):
    """Multiplies x [m, in] by W to [m, out], or, transposed, x [m, out] by W^T to [m, in]."""
    how = {"shape": shape, "block": block, "transposed": transposed, "activation": activation}
    return _product(x, blocks, index, bias, blocks.shape[0], **how)


def _product(x, blocks, index, bias, nnzb: int | None, *, shape, block, transposed, activation):
    """The same; nnzb is None where no two outputs read the same input."""
    m, out = x.shape[0], shape[0 if transposed else 1]
    if 0 in (m, blocks.shape[0]):
        return empty(m, out, bias, activation, x.dtype)
    from pallas_kernels.mosaic import configs, multiply  # Pallas takes longer to import than the rest of this package

    (inner, width), lines, device = block[::-1] if transposed else block, lines_of(index, transposed), describe()
    x, count = _padded(x, 8, max(inner, 64)), lines.ptr.shape[0] - 1
    bias = None if bias is None else jnp.pad(bias, (0, count * width - out))
    config = configs.for_gather(x.shape[0], x.shape[1], inner, width, count, nnzb, device.kind)
    y = multiply.multiply(x, blocks, lines, bias, config, device, transposed=transposed, activation=activation)
    return y[:m, :out]


def sddmm(x, dy, index, *, shape: tuple[int, int], block: tuple[int, int], precision=None):
    """Returns the blocks of x^T dy that W stores, for x [m, in] and dy [m, out]."""
    return _outer(x, dy, index, block, index.col_ptr.shape[0] - 1)


def _outer(x, dy, index, block: tuple[int, int], columns: int | None):
    """The same; columns is their number, or None where no two blocks share a row or a column."""
    values = index.row_index.shape[0], *block
    if 0 in (x.shape[0], values[0]):
        return jnp.zeros(values, x.dtype)
    from pallas_kernels.mosaic import configs, multiply

    (i, o), device, rows = block, describe(), index.row_ptr.shape[0] - 1
    x, dy = _padded(x, 8, max(i, 64)), _padded(dy, 8, max(o, 64))
    config = configs.for_sample(x.shape[0], i, o, values[0], rows, columns, device.kind)
    return multiply.sample(x, dy, index, block, config, device)


def spmm_grads(x, dy, blocks, index, *, shape, block, precision=None):
    """Refuses, as `why_not` says: the gradients of blocks are `spmm` and `sddmm`."""
    raise NotImplementedError(why_not("spmm_grads", x.dtype, block, "cuda"))


def block_diag_matmul(x, blocks, bias=None, *, transposed: bool = False, activation: str | None = None, precision=None):
    """Multiplies slice n of x [m, n*i] by block n to [m, n*o]; transposed, [m, n*o] to [m, n*i]."""
    n, i, o = blocks.shape
    how = {"transposed": transposed, "activation": activation}
    return _product(x, blocks, diagonal(n), bias, None, shape=(n * i, n * o), block=(i, o), **how)


def block_diag_outer(x, dy, num_blocks: int, *, precision=None):
    """Returns the n products [i, o] of the slices of x [m, n*i] and dy [m, n*o]."""
    block = x.shape[1] // num_blocks, dy.shape[1] // num_blocks
    return _outer(x, dy, diagonal(num_blocks), block, None)


def _padded(x, *multiples: int):
    """x with zeros up to whole multiples of both sizes: TMA moves whole tiles of shared memory's layout."""
    missing = [-size % multiple for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, [(0, n) for n in missing]) if any(missing) else x
