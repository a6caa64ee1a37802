"""How both dialects read the int32 arrays of a pattern, and the pattern that a block-diagonal matrix is to them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Lines(NamedTuple):
    """The entries of a matrix line by line, a line being a block column of W, or a block row where W^T is read.

    Entry e, of those from ptr[line] to ptr[line + 1], multiplies block `source[e]` of the input by the values
    at `slot[e]`, or at e where there is no slot.
    """

    ptr: jax.Array
    source: jax.Array
    slot: jax.Array | None


class Index(NamedTuple):
    """The arrays of a block pattern that kernels read."""

    col_ptr: jax.Array
    row_index: jax.Array
    row_ptr: jax.Array
    col_index: jax.Array
    order: jax.Array


def lines_of(index: Any, transposed: bool) -> Lines:
    """What each output adds up. Values stay where they are: the transpose reads them through `slot`."""
    if transposed:
        return Lines(index.row_ptr, index.col_index, index.order)
    return Lines(index.col_ptr, index.row_index, jnp.arange(index.row_index.shape[0], dtype=jnp.int32))


def entries_of(index: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(block row, block column, slot) of every entry, row by row: neighbours share their slice of x."""
    return index.row_index[index.order], index.col_index, index.order


def diagonal(n: int) -> Index:
    """The pattern of n blocks on the diagonal: its kernels are those of any other."""
    at, ptr = jnp.arange(n, dtype=jnp.int32), jnp.arange(n + 1, dtype=jnp.int32)
    return Index(ptr, at, ptr, at, at)
