"""Exact selection of the highest scores in a few passes over them: no sort, and the count may be traced."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


def keys(scores: Float[Array, "*any"]) -> UInt[Array, "*any"]:
    """Scores, in float32, as integers of the same order; equal scores, +0 and -0 too, have equal keys."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores).astype(jnp.float32), jnp.int32)
    ordered = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    return jax.lax.bitcast_convert_type(ordered, jnp.uint32) ^ jnp.uint32(0x80000000)


def threshold(key: UInt[Array, " n"], count: Int[Array, ""]) -> UInt[Array, ""]:
    """The `count`-th highest key; the largest integer if count is 0. By three histograms of 11 bits each."""
    found, shift = jnp.uint32(0), 32
    undecided, left = jnp.ones(key.shape, bool), count
    for bits in (11, 11, 10):
        shift -= bits
        digit = (key >> shift) & jnp.uint32(2**bits - 1)
        bins = jnp.where(undecided, digit, 2**bits).astype(jnp.int32)
        histogram = jnp.zeros(2**bits, jnp.int32).at[bins].add(1, mode="drop")
        at_least = jnp.cumsum(histogram[::-1])[::-1]  # keys whose digit is this one or a higher one
        chosen = jnp.maximum((at_least >= left).sum() - 1, 0)
        left = left - jnp.append(at_least, 0)[chosen + 1]
        undecided &= digit == chosen.astype(jnp.uint32)
        found |= chosen.astype(jnp.uint32) << shift
    return found


def highest(key: UInt[Array, " n"], count: Int[Array, ""]) -> Bool[Array, " n"]:
    """Marks the `count` highest keys; of equal ones the earlier."""
    least = threshold(key, count)
    above, equal = key > least, key == least
    return above | (equal & (ranks(equal) < count - above.sum(dtype=jnp.int32)))


class Marks(NamedTuple):
    """Marked entries by words of 32, and how many are marked before each word: ten times faster than single entries."""

    words: UInt[Array, " w"]
    before: Int[Array, " w"]

    @classmethod
    def of(cls, marked: Bool[Array, " n"]) -> Marks:
        bits = jnp.pad(marked, (0, -marked.size % 32)).reshape(-1, 32).astype(jnp.uint32)
        words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(1, dtype=jnp.uint32)
        counts = jax.lax.population_count(words).astype(jnp.int32)
        return cls(words, jnp.cumsum(counts) - counts)

    def find(self, number: Int[Array, " m"]) -> Int[Array, " m"]:
        """The positions of the marked entries of these numbers, counted from 0; past the end if there are fewer."""
        word = jnp.searchsorted(self.before, number, side="right") - 1
        left, bits, at = number - self.before[word], self.words[word], jnp.zeros_like(number)
        missing = left >= jax.lax.population_count(bits).astype(jnp.int32)
        for width in (16, 8, 4, 2, 1):
            low = jax.lax.population_count((bits >> at.astype(jnp.uint32)) & jnp.uint32(2**width - 1)).astype(jnp.int32)
            above = left >= low
            left, at = jnp.where(above, left - low, left), jnp.where(above, at + width, at)
        return jnp.where(missing, 32 * self.words.size, 32 * word.astype(jnp.int32) + at)


def ranks(marked: Bool[Array, " n"]) -> Int[Array, " n"]:
    """How many entries are marked before each one."""
    words, before = Marks.of(marked)
    lower = (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)) - 1
    inside = jax.lax.population_count(words[:, None] & lower).astype(jnp.int32)
    return (before[:, None] + inside).reshape(-1)[: marked.size]


def packed(marked: Bool[Array, " n"], values: Array, size: int, fill) -> Array:
    """The marked values, in order, in the first entries of an array of `size` that is `fill` behind them."""
    at = jnp.where(marked, ranks(marked), size)
    return jnp.full((size,), fill, values.dtype).at[at].set(values, mode="drop")
