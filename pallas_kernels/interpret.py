"""The Triton kernels under Pallas' interpreter: slow, but on every machine the same logic as on a GPU."""

import functools

import jax.numpy as jnp

from pallas_kernels import triton

__all__ = ["block_diag_matmul", "block_diag_outer", "sddmm", "spmm", "spmm_grads", "why_not"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def why_not(op: str, dtype, block: tuple[int, int], platform: str, elsewhere: bool = False) -> str | None:
    """Returns why `op` can't be interpreted, or None when it can."""
    name = jnp.dtype(dtype).name
    return None if name in _DTYPES else f"dtype {name} is not one of {', '.join(_DTYPES)}"


spmm = functools.partial(triton.spmm, interpret=True)
sddmm = functools.partial(triton.sddmm, interpret=True)
spmm_grads = functools.partial(triton.spmm_grads, interpret=True)
block_diag_matmul = functools.partial(triton.block_diag_matmul, interpret=True)
block_diag_outer = functools.partial(triton.block_diag_outer, interpret=True)
