"""Patterns that move while a sparse weight is trained: SET, RigL and gradual magnitude pruning, as pure functions."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxsparse._sizes import count_kept, count_stored, is_unstructured
from jaxsparse.formats import BlockPattern
from jaxsparse.training import _places, _select
from jaxsparse.training._carry import Path, take, take_state
from jaxsparse.training._places import NOWHERE
from jaxsparse.training._replicas import on_whole

CHUNK = 2**18  # entries of the dense gradient that exist at a time; one block column, where that is more


def rigl(
    blocks: Float[Array, " *values"],
    pattern: BlockPattern,
    opt_state: Any,
    *,
    x: Float[Array, "*batch in"],
    dy: Float[Array, "*batch out"],
    drop_fraction,
    path: Path = None,
) -> tuple[Array, BlockPattern, Any]:
    """Drops the stored entries of least magnitude, and grows as many where the dense gradient x^T dy is largest.

    Everything that is not kept may grow, also what was just dropped, then at zero. Blocks go by their L2 norm. The
    gradient is made `CHUNK` entries (or one block column) at a time, and the best so far are kept: temporaries are at
    most 64 bytes for each entry of a chunk, 48 for each stored block, and copies of x and dy.

    Args:
      blocks, pattern: the weight.
      opt_state: the state of any Optax transformation; its leaves of the shape of `blocks` move along.
      x: the layer's input, and `dy`: the gradient of the loss by x W, before the activation.
      drop_fraction: of the stored entries. Given as an array it may change from call to call of one program, as by
        `optax.cosine_decay_schedule`, the paper's annealing; given as a number it fixes the count, which saves memory.
      path: which parameter `blocks` is, as "hidden.kernel" or a tuple, where several have its shape.
    Returns:
      (blocks, pattern, opt_state), of the same shapes.
    Raises:
      ValueError: for shapes that don't fit, a drop fraction outside [0, 1], or a state in which several parameters
        have this shape and no path is given.
      NotImplementedError: for a grid of 2**32 blocks or more.
    Source: Algorithm 1 of Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134.
    """
    if pattern.transposed:
        x, dy, pattern = dy, x, pattern.T
        blocks, pattern, opt_state = rigl(
            blocks, pattern, opt_state, x=x, dy=dy, drop_fraction=drop_fraction, path=path
        )
        return blocks, pattern.T, opt_state
    count, capacity = _check(blocks, pattern, drop_fraction)
    _check_batch(x, dy, pattern.shape)
    new, source = _rigl(blocks, pattern, x, dy, count, capacity)
    return take(blocks, source), new, take_state(opt_state, source, blocks.shape, path)


def set_(
    key: jax.Array,
    blocks: Float[Array, " *values"],
    pattern: BlockPattern,
    opt_state: Any,
    *,
    drop_fraction,
    path: Path = None,
) -> tuple[Array, BlockPattern, Any]:
    """Drops the stored entries of least magnitude, and grows as many at random, everywhere with the same probability.

    Args, returns and raises: as `rigl`, with a PRNG key instead of `x` and `dy`.
    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
      inspired by network science", arXiv:1707.04780.
    """
    if pattern.transposed:
        blocks, pattern, opt_state = set_(key, blocks, pattern.T, opt_state, drop_fraction=drop_fraction, path=path)
        return blocks, pattern.T, opt_state
    count, capacity = _check(blocks, pattern, drop_fraction)
    new, source = _set(key, blocks, pattern, count, capacity)
    return take(blocks, source), new, take_state(opt_state, source, blocks.shape, path)


def gradual(
    blocks: Float[Array, " *values"], pattern: BlockPattern, opt_state: Any, *, density, path: Path = None
) -> tuple[Array, Any, Bool[Array, " *values"]]:
    """One step of gradual magnitude pruning: all but the largest entries become exactly zero, and so do their moments.

    The pattern stays, so that nothing recompiles while the density falls; `compact` cuts it down at the end. Hand the
    mask to every update, `optimizer.update(..., masks=...)` with `pruning.prune_updates()` last in the chain, and what
    is pruned stays zero. Being smallest, it also stays pruned.

    Args:
      density: the fraction of the *matrix* that is kept, a number or an array, as from `pruning.polynomial`.
      the others: as in `rigl`.
    Returns:
      (blocks, opt_state, mask), the mask in the shape of `blocks`.
    Source: Zhu & Gupta 2017, arXiv:1710.01878.
    """
    pattern.check_values(blocks)

    def chosen(blocks, count):
        kept = _select.highest(_magnitudes(blocks), count)
        return kept, jnp.where(kept, jnp.arange(kept.size, dtype=jnp.int32), kept.size)

    kept, source = on_whole(chosen, blocks, _count(density, math.prod(pattern.grid)))
    mask = jnp.broadcast_to(kept.reshape(-1, *(1,) * (blocks.ndim - 1)), blocks.shape)
    return take(blocks, source), take_state(opt_state, source, blocks.shape, path), mask


def compact(
    blocks: Float[Array, " *values"], pattern: BlockPattern, opt_state: Any, *, density: float, path: Path = None
) -> tuple[Array, BlockPattern, Any]:
    """The largest entries alone, on a smaller pattern: what follows compiles anew, and is as fast as its density.

    Args: as `gradual`; the density is a number.
    Returns:
      (blocks, pattern, opt_state) with round(density * grid_in * grid_out) blocks stored.
    Raises:
      ValueError: if the pattern stores fewer than that.
    """
    if pattern.transposed:
        blocks, pattern, opt_state = compact(blocks, pattern.T, opt_state, density=density, path=path)
        return blocks, pattern.T, opt_state
    pattern.check_values(blocks)
    count = count_stored(density, pattern.shape, pattern.block)
    if count > pattern.nnzb:
        raise ValueError(f"density={density} keeps {count} blocks, but only {pattern.nnzb} are stored.")
    _places.check_grid(pattern.grid)

    def chosen(blocks, pattern):
        kept = _select.highest(_magnitudes(blocks), jnp.int32(count))
        new = _places.pattern_of(_select.packed(kept, _places.places(pattern), count, NOWHERE), pattern)
        return new, _select.packed(kept, jnp.arange(pattern.nnzb, dtype=jnp.int32), count, 0)

    new, source = on_whole(chosen, blocks, pattern)
    return take(blocks, source), new, take_state(opt_state, source, blocks.shape, path)


def move(
    blocks: Float[Array, " *values"], pattern: BlockPattern, opt_state: Any, new: BlockPattern, *, path: Path = None
) -> tuple[Array, Any]:
    """The same weight on another pattern: values and moments where both store an entry, zeros where only `new` does.

    A `new` of density 1 densifies: its gradients are dense, and training can finish dense.

    Returns:
      (blocks, opt_state) for `new`.
    Raises:
      ValueError: if the two differ in shape or block, or one is a transposed view.
    """
    pattern.check_values(blocks)
    if (pattern.shape, pattern.block, pattern.transposed) != (new.shape, new.block, new.transposed):
        raise ValueError(f"values move between patterns of one shape, block and view, not from {pattern} to {new}.")
    _places.check_grid(pattern.grid)
    old, new = (p.T if p.transposed else p for p in (pattern, new))
    source = on_whole(lambda old, new: _places.sources(_places.places(old), _places.places(new)), old, new)
    return take(blocks, source), take_state(opt_state, source, blocks.shape, path)


# ---- dropping and growing ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="capacity")
def _rigl(blocks, pattern, x, dy, count, capacity: int):
    def chosen(blocks, pattern, x, dy, count):
        x, dy = (jnp.asarray(a, jnp.float32).reshape(-1, a.shape[-1]) for a in (x, dy))
        kept = _select.highest(_magnitudes(blocks), pattern.nnzb - count)
        return _regrown(pattern, kept, _strongest(x, dy, pattern, kept, count, capacity))

    return on_whole(chosen, blocks, pattern, x, dy, count)


@functools.partial(jax.jit, static_argnames="capacity")
def _set(key, blocks, pattern, count, capacity: int):
    def chosen(key, blocks, pattern, count):
        kept = _select.highest(_magnitudes(blocks), pattern.nnzb - count)
        taken = _select.packed(kept, _places.places(pattern), pattern.nnzb, NOWHERE)
        grown = _places.draw_others(key, taken, pattern.nnzb - count, pattern.grid, count, capacity)
        return _regrown(pattern, kept, grown)

    return on_whole(chosen, key, blocks, pattern, count)


def _regrown(pattern: BlockPattern, kept, grown: UInt[Array, " capacity"]):
    """The pattern of what is kept and what is grown, and where each of its entries was stored."""
    new, source = _places.merged(_places.places(pattern), kept, grown)
    return _places.pattern_of(new, pattern), source


def _magnitudes(blocks) -> UInt[Array, " nnzb"]:
    values = blocks.astype(jnp.float32)
    return _select.keys(jnp.abs(values) if values.ndim == 1 else jnp.square(values).sum((1, 2)))


# ---- the strongest of a gradient that never exists as a whole -----------------------------------------------


class _Best(NamedTuple):
    """Candidates in storage order: the best so far are among the first `fill`, any other's key is at most `bar`."""

    key: UInt[Array, " size"]
    place: UInt[Array, " size"]
    fill: Int[Array, ""]
    bar: UInt[Array, ""]
    step: Int[Array, ""]


def _strongest(x, dy, pattern: BlockPattern, kept, count, capacity: int) -> UInt[Array, " capacity"]:
    """The `count` places with the largest gradient among those not kept, ascending, NOWHERE behind them."""
    rows, cols = pattern.grid
    width = min(cols, max(1, CHUNK // (rows * math.prod(pattern.block))))  # block columns in a chunk
    keys_of, steps, size = _chunks(x, dy, pattern, kept, width), -(-cols // width), rows * width
    part, room = min(size, 2**13), capacity + 4 * size

    def best_of(best: _Best) -> _Best:
        chosen = _select.highest(best.key, count)
        key, place = (_select.packed(chosen, a, a.size, 0) for a in (best.key, best.place))
        return best._replace(key=key, place=place, fill=count, bar=jnp.where(chosen, best.key, NOWHERE).min())

    def add(best: _Best) -> _Best:
        key = keys_of(best.step)
        passing = key > best.bar
        marks, total = _select.Marks.of(passing), passing.sum(dtype=jnp.int32)
        start = best.step.astype(jnp.uint32) * size

        def append(k, held):
            at = marks.find(k * part + jnp.arange(part, dtype=jnp.int32))
            more = key.at[at].get(mode="fill", fill_value=0), start + at.astype(jnp.uint32)
            return [
                jax.lax.dynamic_update_slice(a, b, (best.fill + k * part,)) for a, b in zip(held, more, strict=True)
            ]

        keys, places = jax.lax.fori_loop(0, -(-total // part), append, [best.key, best.place])
        return _Best(keys, places, best.fill + total, best.bar, best.step + 1)

    def fill(best: _Best) -> _Best:
        return best_of(jax.lax.while_loop(lambda b: (b.step < steps) & (b.fill + size <= room), add, best))

    empty, zero = jnp.zeros(room + part, jnp.uint32), jnp.int32(0)
    best = jax.lax.while_loop(lambda b: b.step < steps, fill, _Best(empty, empty, zero, jnp.uint32(0), zero))
    return jnp.where(jnp.arange(capacity) < count, best.place[:capacity], NOWHERE)


def _chunks(x, dy, pattern: BlockPattern, kept, width: int):
    """A function of the keys of the gradient in `width` block columns, 0 for what is kept or beyond the edge."""
    (i, o), (rows, cols) = pattern.block, pattern.grid
    size, part = rows * width, min(pattern.nnzb, 2**13)
    x = jnp.pad(x, ((0, 0), (0, rows * i - x.shape[1])))
    dyt = jnp.pad(dy, ((0, 0), (0, -(-cols // width) * width * o - dy.shape[1]))).T
    stored = jnp.where(kept, _places.places(pattern), NOWHERE)

    def keys_of(step):
        rows_of_dyt = jax.lax.dynamic_slice_in_dim(dyt, step * width * o, width * o)
        gradient = jnp.dot(rows_of_dyt, x, precision="highest").reshape(width, o, rows, i)
        scores = jnp.abs(gradient[:, 0, :, 0]) if is_unstructured((i, o)) else jnp.square(gradient).sum((1, 3))
        first, start = pattern.col_ptr[step * width], step.astype(jnp.uint32) * size
        last = pattern.col_ptr[jnp.minimum(step * width + width, cols)]

        def leave_out(k, key):
            at = jax.lax.dynamic_slice_in_dim(stored, first + k * part, part) - start
            at = jnp.minimum(at, size).astype(jnp.int32)  # what lies before the start has wrapped around
            return key.at[at].set(0, mode="drop")

        inside = jnp.arange(size, dtype=jnp.uint32) < np.uint32(math.prod(pattern.grid)) - start
        key = jnp.where(inside, _select.keys(scores).reshape(-1), 0)
        return jax.lax.fori_loop(0, -(-(last - first) // max(part, 1)), leave_out, key)

    return keys_of


# ---- checks ----------------------------------------------------------------------------------------------


def _count(fraction, size: int) -> Any:
    """round(fraction * size), where the fraction may be traced."""
    if isinstance(fraction, jax.Array):
        return jnp.round(fraction * size).astype(jnp.int32)
    return np.int32(count_kept(fraction, size))


def _check(blocks, pattern: BlockPattern, drop_fraction) -> tuple[Int[Array, ""], int]:
    """How many entries move, and how many may at most, which is static."""
    pattern.check_values(blocks)
    _places.check_grid(pattern.grid)
    count = _count(drop_fraction, pattern.nnzb)
    return count, pattern.nnzb if isinstance(drop_fraction, jax.Array) else int(count)


def _check_batch(x, dy, shape: tuple[int, int]) -> None:
    if jnp.shape(x)[-1:] != shape[:1] or jnp.shape(dy)[-1:] != shape[1:] or x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x and dy must be [*batch, {shape[0]}] and [*batch, {shape[1]}], got {jnp.shape(x)} and {jnp.shape(dy)}."
        )
