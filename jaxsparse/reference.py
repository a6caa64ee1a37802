"""What each op means, entry by entry in float64 NumPy: the oracle that every back end is held to."""

from __future__ import annotations

import numpy as np

from jaxsparse.formats import BlockPattern


def densify(blocks, pattern: BlockPattern) -> np.ndarray:
    """The dense (in, out) matrix, written block by block; what lies beyond the edge is cut off."""
    if pattern.transposed:
        return densify(blocks, pattern.T).T
    (i, o), (rows, cols) = pattern.block, pattern.grid
    values = np.asarray(blocks, np.float64).reshape(-1, i, o)
    dense = np.zeros((rows * i, cols * o))
    col_ptr, row_index = np.asarray(pattern.col_ptr), np.asarray(pattern.row_index)
    for c in range(cols):
        for k in range(col_ptr[c], col_ptr[c + 1]):
            r = row_index[k]
            dense[r * i : (r + 1) * i, c * o : (c + 1) * o] = values[k]
    return dense[: pattern.shape[0], : pattern.shape[1]]


def spmm(x, blocks, pattern: BlockPattern) -> np.ndarray:
    """y[..., out] = sum_in x[..., in] W[in, out]."""
    return np.asarray(x, np.float64) @ densify(blocks, pattern)


def sddmm(x, dy, pattern: BlockPattern) -> np.ndarray:
    """The blocks of x^T dy that the pattern stores, zero beyond the edge, summed over leading dimensions."""
    if pattern.transposed:
        return sddmm(dy, x, pattern.T)
    x, dy = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, dy))
    (i, o), (rows, cols) = pattern.block, pattern.grid
    dense = np.zeros((rows * i, cols * o))
    dense[: pattern.shape[0], : pattern.shape[1]] = x.T @ dy
    col_ptr, row_index = np.asarray(pattern.col_ptr), np.asarray(pattern.row_index)
    values = np.zeros((pattern.nnzb, i, o))
    for c in range(cols):
        for k in range(col_ptr[c], col_ptr[c + 1]):
            r = row_index[k]
            values[k] = dense[r * i : (r + 1) * i, c * o : (c + 1) * o]
    return values.reshape(pattern.values_shape)


def block_diag_dense(blocks) -> np.ndarray:
    """The dense (n*i, n*o) matrix of n diagonal blocks."""
    n, i, o = blocks.shape
    dense = np.zeros((n * i, n * o))
    for k, block in enumerate(np.asarray(blocks, np.float64)):
        dense[k * i : (k + 1) * i, k * o : (k + 1) * o] = block
    return dense


def block_diag_matmul(x, blocks) -> np.ndarray:
    """y[..., n, o] = sum_i x[..., n, i] blocks[n, i, o]."""
    return np.asarray(x, np.float64) @ block_diag_dense(blocks)
