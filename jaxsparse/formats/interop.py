"""Patterns and values to and from the sparse matrices of SciPy and of `jax.experimental.sparse`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxsparse import _indices
from jaxsparse._indices import across, from_sorted, inverse, lines_of, on_device
from jaxsparse._sizes import INT32_MAX, check_sizes, grid_of, is_unstructured
from jaxsparse.formats import BlockPattern

_IN_SCIPY = ("float32", "float64", "bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)))


def from_scipy(m):
    import scipy.sparse

    if not scipy.sparse.issparse(m) or m.ndim != 2:
        raise ValueError(f"from_scipy wants a two-dimensional SciPy sparse matrix, got {type(m).__name__}.")
    if m.format not in ("csr", "csc", "bsr"):
        _check_lists(m)
        m = m.tocoo()
        return from_coordinates(m.row, m.col, m.data, m.shape, (1, 1))
    is_by_column, block = m.format == "csc", _blocksize(m) if m.format == "bsr" else (1, 1)
    lines = m.shape[is_by_column] // block[is_by_column]
    line = lines_of(m.indptr, lines, m.indices, m.data, f"the {m.format.upper()} matrix's indptr")
    row, col = (m.indices, line) if is_by_column else (line, m.indices)
    grid = grid_of(m.shape, block)
    plain = m.data.ndim == (3 if m.format == "bsr" else 1)
    if plain and _ascends(line, m.indices, grid[not is_by_column]):
        shape, block = check_sizes(m.shape, block)
        if is_by_column:
            index, data = from_sorted(row, col, grid), m.data
        else:
            col_ptr, row, order = across(m.indptr, col, grid[1])
            own = m.indptr.astype(np.int32), col.astype(np.int32)  # copies: JAX may share the memory
            index = on_device(col_ptr, row, *own, inverse(order))
            data = m.data[order]
        pattern = BlockPattern.of_index(index, shape, block)
        return pattern, jnp.asarray(data.reshape(pattern.values_shape))
    return from_coordinates(row, col, m.data, m.shape, block)


def _ascends(line: np.ndarray, index: np.ndarray, size: int) -> bool:
    """Whether the indices of a compressed matrix are in range and ascend in every line: nothing stands twice then."""
    if not index.size or not 0 <= index.min() <= index.max() < size or index.size > INT32_MAX:
        return False
    return bool(((index[1:] > index[:-1]) | (line[1:] != line[:-1])).all())


def to_scipy(pattern: BlockPattern, blocks):
    import scipy.sparse

    pattern.check_values(blocks)
    if blocks.dtype.name not in _IN_SCIPY:
        raise ValueError(f"SciPy has no matrices of {blocks.dtype}: cast the values, as by blocks.astype('float32').")
    (rows, cols), (i, o) = pattern.shape, pattern.block
    if pattern.is_unstructured or rows % i or cols % o:
        row, col, data = _entries(pattern, blocks)
        return scipy.sparse.csr_array((data, (row, col)), shape=pattern.shape)
    ptr, index, order = _by_row(pattern)
    values = np.asarray(blocks)[order]
    values = values.swapaxes(1, 2) if pattern.transposed else values
    return scipy.sparse.bsr_array((values, index, ptr), shape=pattern.shape)


def from_bcoo(m):
    _check_plain(m, "BCOO")
    indices, data = np.asarray(m.indices), np.asarray(m.data)
    if indices.shape != (len(data), 2):
        raise ValueError(
            f"the BCOO matrix has {len(data)} values, which take indices of shape ({len(data)}, 2), got "
            f"{indices.shape}. Build the matrix anew, from the row and the column of every entry."
        )
    padding = (indices == m.shape).all(1)  # how JAX fills up to a fixed `nse`
    row, col = indices[~padding].T
    return from_coordinates(row, col, data[~padding], m.shape, (1, 1))


def to_bcoo(pattern: BlockPattern, blocks):
    from jax.experimental import sparse

    row, col, data = _entries(pattern, blocks)
    indices = jnp.asarray(np.stack([row, col], axis=1), jnp.int32)
    return sparse.BCOO((jnp.asarray(data), indices), shape=pattern.shape, unique_indices=True)


def from_bcsr(m):
    _check_plain(m, "BCSR")
    col, data = np.asarray(m.indices), np.asarray(m.data)
    if len(col) != len(data):
        raise ValueError(
            f"the BCSR matrix has {len(col)} indices and {len(data)} values: there must be as many. Build the matrix "
            "anew, from the row and the column of every entry."
        )
    stored = len(col) - np.count_nonzero(col == m.shape[1])  # JAX fills up to a fixed `nse` with this column
    col, data = col[:stored], data[:stored]
    row = lines_of(np.asarray(m.indptr), m.shape[0], col, data, "the BCSR matrix's indptr")
    return from_coordinates(row, col, data, m.shape, (1, 1))


def to_bcsr(pattern: BlockPattern, blocks):
    from jax.experimental import sparse

    row, col, data = _entries(pattern, blocks)
    order = np.lexsort((col, row))
    indptr = np.searchsorted(row[order], np.arange(pattern.shape[0] + 1))
    arrays = (jnp.asarray(data[order]), jnp.asarray(col[order], jnp.int32), jnp.asarray(indptr, jnp.int32))
    return sparse.BCSR(arrays, shape=pattern.shape, indices_sorted=True, unique_indices=True)


def from_coordinates(row, col, data, shape, block):
    """(pattern, blocks) of entries in any order; what stands twice is summed.

    Raises:
      ValueError: for indices that are no integers or out of range, and unless there is one value, or block of values,
        for each.
    """
    row, col, data = np.asarray(row), np.asarray(col), np.asarray(data)
    shape, block = check_sizes(shape, block)
    grid = grid_of(shape, block)
    _indices.check_coordinates(row, col, grid)
    if data.shape != (len(row), *block) and (not is_unstructured(block) or data.shape != (len(row),)):
        what = "entries" if is_unstructured(block) else f"blocks of {block}"
        raise ValueError(f"{len(row)} {what} were given with values of shape {data.shape}: one each is needed.")
    order = _indices.by_column(row, col, grid)
    row, col, data = row[order], col[order], data[order]
    again = (row[1:] == row[:-1]) & (col[1:] == col[:-1])
    if again.any():
        first = np.flatnonzero(np.concatenate([[True], ~again]))
        row, col, data = row[first], col[first], np.add.reduceat(data, first, axis=0, dtype=data.dtype)
    pattern = BlockPattern.of_index(_indices.from_sorted(row, col, grid), shape, block)
    return pattern, jnp.asarray(data.reshape(pattern.values_shape))


def _blocksize(m) -> tuple[int, int]:
    """That of a BSR matrix, which SciPy takes from the values as they are."""
    if m.data.ndim != 3 or 0 in m.data.shape[1:] or m.shape[0] % m.data.shape[1] or m.shape[1] % m.data.shape[2]:
        raise ValueError(
            f"the BSR matrix's values have shape {m.data.shape}, and must be [blocks, i, o] with blocks that divide "
            f"its shape {m.shape}."
        )
    return m.data.shape[1:]


def _check_lists(m) -> None:
    """Raises ValueError for a LIL matrix with columns and values that don't pair: SciPy would read beyond them."""
    if m.format == "lil":
        lengths = [(len(row), len(data)) for row, data in zip(m.rows, m.data, strict=True)]
        wrong = next((k for k, (columns, values) in enumerate(lengths) if columns != values), None)
        if wrong is not None:
            columns, values = lengths[wrong]
            raise ValueError(f"row {wrong} of the LIL matrix has {columns} columns and {values} values.")


def _check_plain(m, name: str) -> None:
    if type(m).__name__ != name or m.n_batch or m.n_dense or m.ndim != 2:
        what = f"{type(m).__name__} of shape {getattr(m, 'shape', None)}"
        raise ValueError(f"wanted a {name} matrix of two sparse dimensions and no others, got {what}.")


def _by_row(pattern: BlockPattern):
    """(pointers, column indices, positions in `blocks`) by row of the pattern's own view, on the host."""
    col_ptr, row_index, row_ptr, col_index, order = (np.asarray(a) for a in pattern.index)
    if pattern.transposed:
        return col_ptr, row_index, np.arange(pattern.nnzb)
    return row_ptr, col_index, order


def _entries(pattern: BlockPattern, blocks):
    """(row, col, value) of every stored entry inside the matrix, on the host."""
    pattern.check_values(blocks)
    i, o = pattern.block
    values = np.asarray(blocks).reshape(-1, *((o, i) if pattern.transposed else (i, o)))
    values = values.swapaxes(1, 2) if pattern.transposed else values
    row = np.asarray(pattern.rows, np.int64)[:, None, None] * i + np.arange(i)[:, None]
    col = np.asarray(pattern.cols, np.int64)[:, None, None] * o + np.arange(o)
    row, col = np.broadcast_arrays(row, col)
    inside = (row < pattern.shape[0]) & (col < pattern.shape[1])
    return row[inside], col[inside], values[inside]
