"""Norms of dense matrices and of their blocks, the highest of them, and how far one matrix is from another.

Imports JAX only for arrays of it, as the layers of torch need all of this without.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def in_blocks(w: Any, block: tuple[int, int]) -> Any:
    """A matrix of NumPy or JAX, zero-padded to whole blocks, as [grid_in, i, grid_out, o]."""
    (rows, cols), (i, o) = w.shape, block
    if rows % i or cols % o:
        w = _padded(w, ((0, -rows % i), (0, -cols % o)))
    return w.reshape(w.shape[0] // i, i, w.shape[1] // o, o)


def squares_of_blocks(w: Any, block: tuple[int, int]) -> Any:
    """The squared L2 norm of every block, [grid_in, grid_out], in the dtype of the matrix."""
    blocks = in_blocks(w, block)
    return (blocks * blocks).sum(axis=(1, 3))


def highest(score: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` highest scores; of equal ones the earlier. Linear time, unlike a sort."""
    if count == 0:
        return np.zeros(score.shape, bool)
    least = np.partition(score, score.size - count)[score.size - count]
    keep = score > least
    keep[np.flatnonzero(score == least)[: count - keep.sum()]] = True
    return keep


def relative_error(before: Any, after: Any) -> float:
    """|after - before| / |before| of arrays of one shape, in Frobenius norms and float64; of |before| = 0, 0 or 1."""
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    norm, moved = np.linalg.norm(old), np.linalg.norm(new - old)
    return float(moved / norm) if norm else float(moved > 0)


def _padded(w: Any, widths: Any) -> Any:
    if isinstance(w, np.ndarray):
        return np.pad(w, widths)
    import jax.numpy as jnp

    return jnp.pad(w, widths)
