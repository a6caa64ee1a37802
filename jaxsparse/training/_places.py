"""Places: the stored entries of a matrix as sorted integers, column * grid_in + row, and patterns made of them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt

from jaxsparse._indices import Index, rotated
from jaxsparse.formats import BlockPattern
from jaxsparse.training import _select

NOWHERE = np.uint32(2**32 - 1)  # what pads a list of places: behind all others


def check_grid(grid: tuple[int, int]) -> None:
    """Raises NotImplementedError for a grid whose places don't fit uint32."""
    if math.prod(grid) >= NOWHERE:
        raise NotImplementedError(
            f"a grid of {grid} has {math.prod(grid)} places, but moving patterns count them in uint32: "
            f"{NOWHERE} at most. Use larger blocks, or split the matrix."
        )


def places(pattern: BlockPattern) -> UInt[Array, " nnzb"]:
    """The places of what is stored, ascending; `pattern` is no transposed view."""
    return pattern.cols.astype(jnp.uint32) * jnp.uint32(pattern.grid[0]) + pattern.rows.astype(jnp.uint32)


def pattern_of(places: UInt[Array, " nnzb"], like: BlockPattern) -> BlockPattern:
    """The pattern that stores these places, ascending and unique, in a matrix of the sizes of `like`."""
    rows, cols = (jnp.uint32(n) for n in like.grid)
    by_row = jnp.sort(places % rows * cols + places // rows)
    order = jnp.searchsorted(places, by_row % cols * rows + by_row // cols)
    col_ptr, row_ptr = (
        jnp.searchsorted(sorted_places, jnp.arange(n + 1, dtype=jnp.uint32) * per)
        for sorted_places, n, per in ((places, like.grid[1], rows), (by_row, like.grid[0], cols))
    )
    index = Index(col_ptr, places % rows, row_ptr, by_row % cols, order)
    return BlockPattern.of_index(Index(*(a.astype(jnp.int32) for a in index)), like.shape, like.block)


def merged(
    old: UInt[Array, " n"], kept: Bool[Array, " n"], grown: UInt[Array, " k"]
) -> tuple[UInt[Array, " n"], Int[Array, " n"]]:
    """The kept and the grown places as one ascending list, and where each one was in `old`: n, if it is grown.

    Both lists ascend, `grown` with NOWHERE behind as many places as are not kept.
    """
    n = old.size
    was = _select.packed(kept, jnp.arange(n, dtype=jnp.int32), n, n)
    stays = old.at[was].get(mode="fill", fill_value=NOWHERE)
    at = jnp.arange(grown.size, dtype=jnp.int32) + jnp.searchsorted(stays, grown).astype(jnp.int32)
    is_grown = jnp.zeros(n, bool).at[at].set(True, mode="drop", unique_indices=True)
    source = jnp.where(is_grown, n, was[jnp.arange(n) - _select.ranks(is_grown)])
    new = old.at[source].get(mode="fill", fill_value=0)
    return new.at[at].set(grown, mode="drop", unique_indices=True), source


def sources(old: UInt[Array, " old"], new: UInt[Array, " new"]) -> Int[Array, " new"]:
    """Where each new place is among the old ones, `old.size` if it is not."""
    at = jnp.searchsorted(old, new).astype(jnp.int32)
    return jnp.where(old.at[at].get(mode="fill", fill_value=NOWHERE) == new, at, old.size)


def draw_others(
    key: jax.Array, taken: UInt[Array, " n"], taken_count, grid: tuple[int, int], count, capacity: int
) -> UInt[Array, " capacity"]:
    """`count` places that are not among `taken` (ascending, NOWHERE behind `taken_count`), NOWHERE behind them.

    The free places, numbered, are cut into `count` equal runs, the longer ones first; one is drawn from each, and all
    numbers are rotated by one random amount, which makes every free place equally likely.
    """
    phase_key, draw_key = jax.random.split(key)
    free = jnp.uint32(math.prod(grid)) - taken_count.astype(jnp.uint32)
    count = count.astype(jnp.uint32)
    run, longer = free // jnp.maximum(count, 1), free % jnp.maximum(count, 1)
    slot = jnp.arange(capacity, dtype=jnp.uint32)
    low = slot * run + jnp.minimum(slot, longer)
    number = jax.random.randint(draw_key, (capacity,), low, low + run + (slot < longer), jnp.uint32)
    phase = jax.random.randint(phase_key, (), 0, jnp.maximum(free, 1), jnp.uint32)
    number = rotated(number, phase, free)
    # The place of free number n is n plus the taken places before it: those with (place - its rank) <= n.
    entry = jnp.arange(taken.size, dtype=jnp.uint32)
    free_before = jnp.where(entry < taken_count, taken - entry, NOWHERE)
    place = number + jnp.searchsorted(free_before, number, side="right").astype(jnp.uint32)
    return jnp.sort(jnp.where(slot < count, place, NOWHERE))
