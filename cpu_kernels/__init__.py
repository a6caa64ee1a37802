"""Sparse products on a CPU: C++ kernels behind XLA's foreign function interface.

A back end: plain 2-D arrays in and out, sums in float32 (float64 for float64), one rounding to
the dtype of `x` after bias and activation. `index` is any object with the int32 arrays of a
block pattern: `col_ptr`, `row_index` by block column, and `row_ptr`, `col_index`, `order` by
block row, where `order` says at which place of `blocks` an entry's values are. `row_index` and
`col_index` may be uint16: single entries times one row read `row_index` as it is, all else widens
them in the program.
`precision` is taken for the contract's sake: the sums never run in less than float32.

JAX is imported where it is used: the same kernels run without it (`cpu_kernels.direct`).
"""

import numpy as np

from cpu_kernels._library import library_file, load, products, why_not_loaded

__all__ = [
    "block_diag_matmul",
    "block_diag_outer",
    "isa",
    "library_file",
    "n_m_spmm",
    "sddmm",
    "spmm",
    "spmm_grads",
    "use_isa",
    "why_not",
]

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_ACTIVATIONS = (None, "relu", "gelu", "silu")


def why_not(op: str, dtype, block: tuple[int, int], platform: str, elsewhere: bool = False) -> str | None:
    """Returns why `op` can't run here on such arrays, or None when it can. The library is needed here all the same
    where the program is for another machine (`elsewhere`)."""
    if platform != "cpu":
        return f"these kernels run on a CPU, not on {platform}"
    if (name := np.dtype(dtype).name) not in _DTYPES:
        return f"dtype {name} is not one of {', '.join(_DTYPES)}"
    if op == "spmm_grads" and tuple(block) != (1, 1):
        return f"spmm_grads is for block (1, 1), not {tuple(block)}: use spmm and sddmm"
    if reason := why_not_loaded():
        return reason
    return None if op in products() else f"there is no kernel {op}; there are {', '.join(products())}"


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
    del precision
    if transposed:
        lines = index.row_ptr, _widened(index.col_index), index.order
    elif x.shape[0] == 1 and tuple(block) == (1, 1):
        lines = index.col_ptr, index.row_index, _nothing(np.int32)
    else:
        lines = index.col_ptr, _widened(index.row_index), _nothing(np.int32)
    return _call("spmm", (x.shape[0], shape[0 if transposed else 1]), x.dtype)(
        x,
        blocks,
        *lines,
        _bias(bias, x),
        transposed=transposed,
        activation=_activation(activation),
        **_sizes(shape),
        **_block(block),
    )


def sddmm(x, dy, index, *, shape: tuple[int, int], block: tuple[int, int], precision=None):
    """Returns x^T dy at the stored entries, for x [m, in] and dy [m, out]."""
    del precision
    nnzb = index.row_index.shape[0]
    values = (nnzb,) if tuple(block) == (1, 1) else (nnzb, *block)
    lines = index.col_ptr, _widened(index.row_index)
    return _call("sddmm", values, x.dtype)(x, dy, *lines, **_sizes(shape), **_block(block))


def spmm_grads(x, dy, blocks, index, *, shape: tuple[int, int], block: tuple[int, int], precision=None):
    """Returns (dy W^T, x^T dy where W is stored) for block (1, 1), in one pass over dy."""
    del precision
    if reason := why_not("spmm_grads", x.dtype, block, "cpu"):
        raise NotImplementedError(reason)
    results = _result(x.shape, x.dtype), _result(blocks.shape, x.dtype)
    lines = index.row_ptr, _widened(index.col_index), index.order
    return _ffi_call("spmm_grads", results)(x, dy, blocks, *lines, **_sizes(shape))


def block_diag_matmul(x, blocks, bias=None, *, transposed: bool = False, activation: str | None = None, precision=None):
    """Multiplies slice n of x [m, n*i] by block n to [m, n*o]; transposed, [m, n*o] to [m, n*i]."""
    del precision
    width = blocks.shape[0] * blocks.shape[1 if transposed else 2]
    return _call("block_diag_matmul", (x.shape[0], width), x.dtype)(
        x, blocks, _bias(bias, x), transposed=transposed, activation=_activation(activation)
    )


def block_diag_outer(x, dy, num_blocks: int, *, precision=None):
    """Returns the n products [i, o] of the slices of x [m, n*i] and dy [m, n*o]."""
    del precision
    values = num_blocks, x.shape[1] // num_blocks, dy.shape[1] // num_blocks
    return _call("block_diag_outer", values, x.dtype)(x, dy)


def n_m_spmm(
    x,
    values,
    bits,
    bias=None,
    *,
    n: int,
    m: int,
    shape: tuple[int, int],
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
):
    """Multiplies x by W, or its transpose, of which n of every m rows are stored in each column."""
    del n, precision
    how = {"m": np.int64(m), "size_in": np.int64(shape[0]), "transposed": transposed}
    call = _call("n_m_spmm", (x.shape[0], shape[0 if transposed else 1]), x.dtype)
    return call(x, values, bits, _bias(bias, x), activation=_activation(activation), **how)


def isa() -> str:
    """Returns the instruction set in use: amx (AVX-512 with tile registers), avx512, avx2 or portable."""
    return load().jaxsparse_cpu_isa().decode()


def use_isa(name: str) -> None:
    """Uses another instruction set; raises where this machine lacks it."""
    if not load().jaxsparse_cpu_use_isa(name.encode()):
        raise ValueError(f"this machine has no {name}; it runs {isa()}")


def _call(name, shape, dtype):
    return _ffi_call(name, _result(shape, dtype))


def _ffi_call(name, results):
    import jax

    load()
    return jax.ffi.ffi_call(f"jaxsparse_cpu_{name}", results, vmap_method="sequential")


def _result(shape, dtype):
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _widened(index):
    return index.astype(np.int32) if index.dtype == np.uint16 else index


def _bias(bias, x):
    return _nothing(x.dtype) if bias is None else bias


def _nothing(dtype):
    """An operand that is left out. No constant: a program that is partitioned may hold none."""
    import jax.numpy as jnp

    return jnp.zeros(0, dtype)


def _activation(name: str | None) -> np.int64:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {_ACTIVATIONS}")
    return np.int64(_ACTIVATIONS.index(name))


def _sizes(shape):
    return {"size_in": np.int64(shape[0]), "size_out": np.int64(shape[1])}


def _block(block):
    return {"block_in": np.int64(block[0]), "block_out": np.int64(block[1])}
