"""The index arrays of a pattern: checked and sorted on the host, or drawn at random under a trace."""

from __future__ import annotations

import functools
from collections.abc import Sized
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsparse._sizes import INT32_MAX


class Index(NamedTuple):
    """The five int32 arrays of a pattern, as kernels read them; `BlockPattern` says what each holds."""

    col_ptr: Int[Array, " cols+1"]
    row_index: Int[Array, " nnzb"]
    row_ptr: Int[Array, " rows+1"]
    col_index: Int[Array, " nnzb"]
    order: Int[Array, " nnzb"]


def stored_columns(index: Index) -> Int[Array, " nnzb"]:
    """The block column of every stored entry. A scatter: four times cheaper than repeating col_ptr."""
    at = jnp.zeros_like(index.order).at[index.order]
    return at.set(index.col_index, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def stratified(key: jax.Array, grid: tuple[int, int], count: int) -> Index:
    """`count` entries over a grid: every place is equally likely, and columns are equal to within one.

    A column of k entries draws one row from each of k strata, which are equal to within one row, and a random amount
    of its own rotates what it drew: of the strata alone, the smaller ones would make their rows likelier. Another
    amount rotates the columns, so that each is as likely as any to be one of those that take one entry more.
    """
    rows, cols = grid
    turn_key, row_key = jax.random.split(key)
    turns = jax.random.randint(turn_key, (cols + 1,), 0, np.append(np.full(cols, rows), cols), jnp.int32)
    turn, phase = turns[cols], turns[:cols]  # of the columns, and of the rows of each
    per, extra = divmod(count, cols)  # `extra` columns take one more
    per_column = per + (rotated(jnp.arange(cols, dtype=jnp.int32), turn, cols) < extra).astype(jnp.int32)
    col_ptr = jnp.append(jnp.int32(0), jnp.cumsum(per_column, dtype=jnp.int32))
    entry = jnp.arange(count, dtype=jnp.int32)
    turned = rotated(entry, turn * per + jnp.minimum(turn, extra), count)  # its number, were the longer columns first
    longer = turned < extra * (per + 1)
    turned_col = jnp.where(longer, turned // (per + 1), extra + (turned - extra * (per + 1)) // max(per, 1))
    entry_col = rotated(turned_col, cols - turn, cols)
    k, first = per_column[entry_col], col_ptr[entry_col]
    size, larger = rows // k, rows % k  # the larger strata come first
    slot = entry - first
    low = slot * size + jnp.minimum(slot, larger)
    drawn = jax.random.randint(row_key, (count,), low, low + size + (slot < larger).astype(jnp.int32), jnp.int32)
    drawn_row = rotated(drawn, phase[entry_col], rows)
    # Those that went past the end stand first in their column.
    past = jnp.zeros(cols, jnp.int32).at[entry_col].add((drawn_row < drawn).astype(jnp.int32), indices_are_sorted=True)
    row_index = drawn_row[first + rotated(slot, k - past[entry_col], k)]
    sorted_rows, order = jax.lax.sort_key_val(row_index, entry)
    row_ptr = jnp.searchsorted(sorted_rows, jnp.arange(rows + 1, dtype=jnp.int32)).astype(jnp.int32)
    return Index(col_ptr, row_index, row_ptr, entry_col[order], order)


def rotated(number: Array, amount: Array, size: Array | int) -> Array:
    """(number + amount) % size for a number below `size` and an amount up to it, without the sum that overflows."""
    return jnp.where(number >= size - amount, number - (size - amount), number + amount)


def from_sorted(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> Index:
    """The index arrays of coordinates that are sorted by column, computed on the host."""
    return Index(*(jnp.asarray(a) for a in all_arrays(rows, cols, grid)))


def from_pointers(col_ptr: np.ndarray, row_index: np.ndarray, grid: tuple[int, int]) -> Index:
    """The index arrays of the two that say everything, which are checked; with leading axes, a stack of them.

    Raises:
      ValueError: unless the pointers begin at 0, never fall and end at the number of entries, and the rows are in
        range and ascend within each column.
    """
    leading = row_index.shape[:-1]
    if not leading:
        return Index(*(jnp.asarray(a) for a in _all_from_pointers(col_ptr, row_index, grid)))
    if col_ptr.shape[:-1] != leading:
        raise ValueError(f"col_ptr and row_index are a stack of the same axes, got {col_ptr.shape}, {row_index.shape}.")
    sizes = (grid[1] + 1, row_index.shape[-1], grid[0] + 1, row_index.shape[-1], row_index.shape[-1])
    stack = [np.zeros((*leading, size), np.int32) for size in sizes]
    for place in np.ndindex(leading):
        for a, one in zip(stack, _all_from_pointers(col_ptr[place], row_index[place], grid), strict=True):
            a[place] = one
    return Index(*(jnp.asarray(a) for a in stack))


def check_index(index: Index, grid: tuple[int, int]) -> None:
    """Raises ValueError unless five concrete arrays, with the same leading axes if any, are patterns of this grid."""
    arrays = {name: np.asarray(a) for name, a in index._asdict().items()}
    shapes, leading = {name: a.shape for name, a in arrays.items()}, arrays["row_index"].shape[:-1]
    if any(shape[:-1] != leading for shape in shapes.values()) or not all(shapes.values()):
        raise ValueError(f"these are not the arrays of one pattern, nor of a stack of them: {shapes}.")
    for place in np.ndindex(leading):
        right = _all_from_pointers(arrays["col_ptr"][place], arrays["row_index"][place], grid)
        for (name, a), want in zip(arrays.items(), right, strict=True):
            if a.dtype.kind not in "iu" or not np.array_equal(a[place], want):
                raise ValueError(f"{name} is not what follows from col_ptr and row_index: it was changed.")


def all_arrays(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The arrays of `Index`, on the host."""
    rows, cols = rows.astype(np.int32), cols.astype(np.int32)  # copies: JAX may share the memory of what it is given
    order = _order(rows, grid[0])
    return _bounds(cols, grid[1]), rows, _bounds(rows, grid[0]), cols[order], order


def _all_from_pointers(col_ptr: np.ndarray, row_index: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    if col_ptr.shape != (grid[1] + 1,) or row_index.ndim != 1:
        raise ValueError(
            f"{grid[1]} columns take a col_ptr of shape ({grid[1] + 1},) and a vector row_index, got {col_ptr.shape} "
            f"and {row_index.shape}."
        )
    if col_ptr.dtype.kind not in "iu":
        raise ValueError(f"col_ptr must be integers, got {col_ptr.dtype}.")
    counts = np.diff(col_ptr.astype(np.int64))
    if col_ptr[0] != 0 or col_ptr[-1] != row_index.size or (counts < 0).any():
        raise ValueError(
            f"col_ptr goes from {col_ptr[0]} to {col_ptr[-1]} and falls {np.count_nonzero(counts < 0)} times; it must "
            f"rise from 0 to the {row_index.size} entries of row_index."
        )
    cols = np.repeat(np.arange(grid[1], dtype=np.int32), counts)
    check_indices(row_index, cols, grid)
    return all_arrays(row_index, cols, grid)


def on_device(*index: np.ndarray) -> Index:
    """The five arrays on the host, which nobody writes to, as JAX's."""
    return Index(*(jnp.asarray(a, jnp.int32) for a in index))


def across(ptr: np.ndarray, index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A view by lines, whose indices ascend, as the view by the other side: (ptr, index, order).

    Entry k of the result is entry order[k] of what was given. Linear time: SciPy sorts so.

    Args:
      ptr, index: line k has the entries from ptr[k] to ptr[k + 1], at these places of the other side.
      size: the length of a line, and so the number of lines of the result.
    Raises:
      ValueError: for more entries than int32 can index.
    """
    import scipy.sparse

    check_count(len(index))
    positions = np.arange(len(index), dtype=np.int32)
    other = scipy.sparse.csr_array((positions, index, ptr), shape=(len(ptr) - 1, size)).tocsc()
    return other.indptr, other.indices, other.data


def inverse(order: np.ndarray) -> np.ndarray:
    """Where each entry of a permutation is."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order), dtype=order.dtype)
    return places


def check_count(entries: int) -> None:
    """Raises ValueError for more entries than int32 can index."""
    if entries > INT32_MAX:
        raise ValueError(f"{entries} entries are more than int32 can index ({INT32_MAX}).")


def by_column(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The order that sorts entries by column, then by row; of equal ones the earlier first."""
    if (rows[1:] >= rows[:-1]).all():  # as a CSR matrix has them: half the work
        return _order(cols, grid[1])
    order = _order(rows, grid[0])
    return order[_order(cols[order], grid[1])]


def _order(rows: np.ndarray, size: int) -> np.ndarray:
    """A stable argsort, 16 bits at a time: of those NumPy sorts by radix, in linear time."""
    order = np.argsort(rows.astype(np.uint16), kind="stable").astype(np.int32)  # by the lower 16 bits
    if size > 2**16:
        order = order[np.argsort((rows[order] >> 16).astype(np.uint16), kind="stable")]
    return order


def _bounds(index: np.ndarray, size: int) -> np.ndarray:
    """int32 [size + 1]: how many entries of `index` lie before each of 0 to `size`."""
    bounds = np.zeros(size + 1, np.int32)
    np.cumsum(np.bincount(index, minlength=size), out=bounds[1:])
    return bounds


def check_indices(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> None:
    """Raises ValueError unless (rows, cols) are integers, in range, unique and sorted by column, then row."""
    check_coordinates(rows, cols, grid)
    step = np.diff(cols.astype(np.int64) * grid[0] + rows.astype(np.int64))
    if (step <= 0).any():
        k = int(np.argmax(step <= 0))
        what = "duplicate" if step[k] == 0 else "unsorted"
        raise ValueError(
            f"{what} entries at positions {k} and {k + 1}: ({rows[k]}, {cols[k]}), "
            f"({rows[k + 1]}, {cols[k + 1]}). Sort by column, then row: order = np.lexsort((rows, cols)); "
            "the values must be put in the same order, and duplicates summed."
        )


def check_coordinates(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> None:
    """Raises ValueError unless (rows, cols) are vectors of one length, of integers in range, in any order."""
    if rows.ndim != 1 or rows.shape != cols.shape:
        raise ValueError(f"rows and cols are vectors of one length, got {rows.shape} and {cols.shape}.")
    for name, index, size in (("row", rows, grid[0]), ("column", cols, grid[1])):
        if index.size and index.dtype.kind not in "iu":
            raise ValueError(f"{name} indices must be integers, got {index.dtype}.")
        bad = np.flatnonzero((index < 0) | (index >= size))
        if bad.size:
            raise ValueError(
                f"{name} index {index[bad[0]]} at position {bad[0]} is outside 0 to {size - 1} "
                f"({bad.size} such entries); indices count blocks, not features."
            )
    check_count(rows.size)


def lines_of(ptr: np.ndarray, lines: int, index: np.ndarray, values: Sized, what: str) -> np.ndarray:
    """The line of every entry of a compressed matrix, CSR, CSC or BSR: line k has those from ptr[k] to ptr[k + 1].

    Args:
      lines: the number of rows (of columns in CSC; of blocks along them in BSR).
      index, values: what is stored; only their lengths are looked at.
      what: where `ptr` comes from, for messages.
    Raises:
      ValueError: unless `ptr` is `lines + 1` integers that start at 0, never fall, and end at the number of entries.
    """
    ptr, stored = np.asarray(ptr), len(index)
    if ptr.shape != (lines + 1,) or ptr.dtype.kind not in "iu":
        raise ValueError(f"{what} is {ptr.dtype} of shape {ptr.shape}, but {lines} lines need {lines + 1} integers.")
    counts = np.diff(ptr.astype(np.int64))
    if (counts < 0).any():
        k = int(np.argmax(counts < 0))
        raise ValueError(
            f"{what} falls from {ptr[k]} to {ptr[k + 1]} at position {k + 1}: it must say how many entries stand "
            "before each line. Build the matrix anew, from the row and the column of every entry."
        )
    if ptr[0] != 0 or ptr[-1] != stored or len(values) != stored:
        raise ValueError(
            f"{what} runs from {ptr[0]} to {ptr[-1]}, with {stored} indices and {len(values)} values: it must run from "
            "0 to the number of both. Cut off what is too much, or build the matrix anew, from the row and the column "
            "of every entry."
        )
    return np.repeat(np.arange(lines, dtype=np.int32), counts)
