"""Matrices of which n of every m neighbouring inputs are stored: from their values to dense, and back.

W [in, out] is cut into groups of m rows, the last one filled up with zeros. `bits` [groups, out] has bit k set where
row k of the group is stored; `values` [groups, n, out] has the stored rows in ascending order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt


def groups_of(rows: int, m: int) -> int:
    """How many groups of m there are, the one at the edge included."""
    return -(-rows // m)


def in_groups(w: Any, m: int) -> Any:
    """A matrix, zero-padded to whole groups, as [groups, m, out]."""
    xp = np if isinstance(w, np.ndarray) else jnp
    w = xp.pad(w, ((0, -w.shape[0] % m), (0, 0)))
    return w.reshape(-1, m, w.shape[1])


def highest(score: Any, n: int) -> Any:
    """Where the n highest scores of each group [groups, m, out] are; of equal ones the earlier."""
    xp, m = np if isinstance(score, np.ndarray) else jnp, score.shape[1]
    earlier = xp.arange(m)[:, None]
    higher = [(score[:, k, None] > score) | ((score[:, k, None] == score) & (earlier > k)) for k in range(m)]
    return sum(h.astype(xp.int32) for h in higher) < n


def dtype_of_bits(m: int) -> np.dtype:
    """Of the integers with a bit for each row of a group."""
    return np.dtype(np.uint8 if m <= 8 else np.uint32)


def to_bits(stored: Bool[Array, "groups m out"]) -> UInt[Array, "groups out"]:
    """A bit for each row of a group."""
    m = stored.shape[1]
    dtype = dtype_of_bits(m)
    return (jnp.asarray(stored).astype(dtype) << jnp.arange(m, dtype=dtype)[:, None]).sum(1, dtype=dtype)


def expand(
    values: Float[Array, "groups n out"], bits: UInt[Array, "groups out"], m: int, rows: int
) -> Float[Array, "rows out"]:
    """The dense matrix. All of it is one pass over the result: nothing is gathered or scattered."""
    k = jnp.arange(m, dtype=bits.dtype)[:, None]
    stored, rank = _stored(bits[:, None], k)
    w = jnp.zeros((values.shape[0], m, values.shape[2]), values.dtype)
    for j in range(values.shape[1]):
        w = jnp.where(stored & (rank == j), values[:, j, None], w)
    return w.reshape(-1, values.shape[2])[:rows]


def compress(w: Float[Array, "rows out"], bits: UInt[Array, "groups out"], n: int, m: int):
    """The stored values of a dense matrix, zero beyond its edge: [groups, n, out]."""
    grouped, j = in_groups(w, m), jnp.arange(n, dtype=bits.dtype)[:, None]
    values = jnp.zeros((grouped.shape[0], n, w.shape[1]), w.dtype)
    for k in range(m):
        stored, rank = _stored(bits[:, None], bits.dtype.type(k))
        values = jnp.where(stored & (rank == j), grouped[:, k, None], values)
    return values


def _stored(bits, k):
    """(whether row k is stored, how many rows before it are)."""
    one = bits.dtype.type(1)
    return (bits >> k) & one == one, jax.lax.population_count(bits & ((one << k) - one))
