"""`Parts`: a pattern cut into pieces of one static size, one for each device along a mesh axis."""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from jaxsparse import _indices
from jaxsparse._sizes import grid_of
from jaxsparse.formats import BlockPattern


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The pieces of a pattern, stacked, so that `jax.vmap` runs over them and a mesh axis shares them out.

    Cut along axis 1 each piece has some block columns: it maps all inputs to a slice of the outputs (column parallel).
    Cut along axis 0 it has some block rows: it maps a slice of the inputs to all outputs, and their sum over the
    pieces is the product (row parallel). Slices have one width, ceil(blocks / pieces) blocks; the last may reach beyond
    the matrix, or be empty.

    Every piece stores as many blocks as the fullest. What others lack is stored in *spare* block columns (of axis 0:
    rows) behind the slice. The value there is zero, `fit` gives the spare inputs zeros, and `cut` takes the spare
    outputs away. So padding adds exactly nothing to a result, and its gradient is exactly zero.

    Attributes:
      pattern: a BlockPattern of which each array has the leading axis of the pieces: the shape is that of one piece.
      shape: (in, out) of the whole matrix.
      axis: along which it is cut.
      nnzb: how many blocks the whole matrix stores; the rest of pieces * pattern.nnzb is padding.
      width: features in a slice.
      pieces: into how many it was cut. `count` is how many are here: one, inside `jax.shard_map`.
    """

    pattern: BlockPattern
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    nnzb: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    pieces: int = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        """How many pieces these are."""
        return self.pattern.row_index.shape[0]

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values of all pieces: [count, nnzb of one, i, o], or [count, nnz of one] for single entries."""
        return (self.count, *self.pattern.values_shape)

    @property
    def T(self) -> Parts:
        """The parts of the transposed matrix, views of the same arrays and values: columns become rows."""
        return dataclasses.replace(self, pattern=self.pattern.T, shape=self.shape[::-1], axis=1 - self.axis)

    @property
    def own(self) -> BlockPattern:
        """The one piece that a device has inside `jax.shard_map`."""
        if self.count != 1:
            raise ValueError(
                f"there are {self.count} pieces here, not one: inside jax.shard_map over an axis of as many devices "
                "as pieces, with in_specs=P(axis) for the parts, each has one. Elsewhere use jax.vmap over .pattern."
            )
        return jax.tree.map(lambda a: a[0], self.pattern)

    # ---- activations ------------------------------------------------------------------------------

    def fit(self, x: Float[Array, "*batch slice"]) -> Float[Array, "*batch in"]:
        """The input of one piece: its slice with zeros for the spare rows. Along axis 1, all inputs as they are."""
        spare = self.pattern.shape[0] - jnp.shape(x)[-1]
        wanted = self.width if self.axis == 0 else self.shape[0]
        if jnp.shape(x)[-1] != wanted:
            raise ValueError(f"a piece takes {wanted} inputs, got x of shape {jnp.shape(x)}: see `slices`.")
        return jnp.pad(x, [(0, 0)] * (jnp.ndim(x) - 1) + [(0, spare)]) if spare else x

    def cut(self, y: Float[Array, "*batch out"]) -> Float[Array, "*batch slice"]:
        """The output of one piece without its spare columns. Along axis 0, all outputs as they are."""
        return y[..., : self.width] if self.axis == 1 else y

    def slices(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch padded"]:
        """Features along the cut axis with zeros up to whole slices, which `P(..., axis)` then shares out evenly."""
        size, padded = self.shape[self.axis], self.pieces * self.width
        if jnp.shape(x)[-1] != size:
            raise ValueError(f"the matrix has {size} features along axis {self.axis}, got shape {jnp.shape(x)}.")
        return jnp.pad(x, [(0, 0)] * (jnp.ndim(x) - 1) + [(0, padded - size)])

    # ---- values -----------------------------------------------------------------------------------

    def split(self, blocks: Float[Array, " *values"]) -> Float[Array, "count nnzb *block"]:
        """The values of the whole matrix as those of its pieces, zero where they are padded.

        Raises ValueError unless they have the shape that the whole pattern stores.
        """
        wanted = (self.nnzb, *self.pattern.values_shape[1:])
        if jnp.shape(blocks) != wanted:
            raise ValueError(f"blocks have shape {jnp.shape(blocks)}, but the whole pattern stores {wanted}.")
        flat = jnp.zeros((self.count * self.pattern.nnzb, *wanted[1:]), jnp.asarray(blocks).dtype)
        return flat.at[self._places()].set(blocks, unique_indices=True).reshape(self.values_shape)

    def join(self, values: Float[Array, "count nnzb *block"]) -> Float[Array, " *values"]:
        """The values of the whole matrix, in its order: what `split` was given, bit for bit."""
        if jnp.shape(values) != self.values_shape:
            raise ValueError(
                f"values have shape {jnp.shape(values)}, but the {self.count} pieces store {self.values_shape}. Inside "
                "jax.shard_map a device has only its own; join outside."
            )
        return values.reshape(-1, *values.shape[2:])[self._places()]

    def whole(self) -> BlockPattern:
        """The pattern that was cut; must be concrete."""
        stored = self._stored
        rows, cols, _ = (np.asarray(a) for a in stored._coordinates())
        at = np.asarray(self._places())
        index = _indices.from_sorted(rows[at], cols[at], grid_of(stored.shape, stored.pattern.block))
        index = index._replace(row_index=index.row_index.astype(self.pattern.row_index.dtype))
        pattern = BlockPattern.of_index(index, stored.shape, stored.pattern.block)
        return pattern.T if self.pattern.transposed else pattern

    @property
    def _stored(self) -> Parts:
        return self.T if self.pattern.transposed else self

    def _coordinates(self) -> tuple[Array, Array, Array]:
        """(row, column) in the whole matrix of every stored block, piece by piece, and whether it is no padding."""
        at = [jax.vmap(lambda one: one.rows)(self.pattern), jax.vmap(lambda one: one.cols)(self.pattern)]
        slice_ = self.width // self.pattern.block[self.axis]
        real = at[self.axis] < slice_
        at[self.axis] = at[self.axis].astype(jnp.int32) + slice_ * jnp.arange(self.count, dtype=jnp.int32)[:, None]
        rows, cols, real = (a.reshape(-1) for a in (*at, real))
        return rows, cols, real

    def _places(self) -> Array:
        """Where each block of the whole pattern, in its order, is among those of all pieces."""
        rows, cols, real = self._stored._coordinates()
        return jnp.lexsort((rows, cols, ~real))[: self.nnzb]


def split(pattern: BlockPattern, pieces: int, axis: int) -> Parts:
    """`BlockPattern.split`, which says what it does."""
    _check(pattern, pieces, axis)
    if pattern.transposed:
        return split(pattern.T, pieces, 1 - axis).T
    at = [np.asarray(pattern.rows).astype(np.int64), np.asarray(pattern.cols).astype(np.int64)]
    grid = pattern.grid
    blocks, across = -(-grid[axis] // pieces), grid[1 - axis]  # of a slice, along and across
    piece = at[axis] // blocks
    counts = np.bincount(piece, minlength=pieces)
    most = int(counts.max())
    spare = -(-(most - int(counts.min())) // across)
    sizes, block = list(grid), pattern.block
    sizes[axis] = blocks + spare
    stack = [_piece([a[piece == k] for a in at], most, k, axis, (blocks, across), sizes) for k in range(pieces)]
    index = _indices.Index(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*stack, strict=True)))
    index = index._replace(row_index=index.row_index.astype(pattern.row_index.dtype))
    shape = list(pattern.shape)
    shape[axis] = (blocks + spare) * block[axis]
    parts = BlockPattern.of_index(index, (shape[0], shape[1]), block)
    return Parts(parts, pattern.shape, axis, pattern.nnzb, blocks * block[axis], pieces)


def _piece(at, most: int, number: int, axis: int, slice_: tuple[int, int], sizes) -> tuple[np.ndarray, ...]:
    """The index arrays of one piece: its entries, and behind its slice as many more as it takes."""
    (blocks, across), more = slice_, np.arange(most - at[0].size)
    padding = [more % across, more % across]
    padding[axis] = blocks + more // across
    at = [np.concatenate([a, b]) for a, b in zip(at, padding, strict=True)]
    at[axis][: at[axis].size - more.size] -= number * blocks
    order = _indices.by_column(at[0], at[1], (sizes[0], sizes[1]))
    return _indices.all_arrays(at[0][order], at[1][order], (sizes[0], sizes[1]))


def _check(pattern: BlockPattern, pieces: int, axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(f"axis={axis!r}: 0 cuts the inputs (row parallel), 1 the outputs (column parallel).")
    if operator.index(pieces) < 1:
        raise ValueError(f"{pieces} pieces: there must be at least one, one for each device along the mesh axis.")
    if isinstance(pattern.row_index, core.Tracer):
        raise ValueError(
            "a pattern is cut by counting the blocks of each piece, so it must be concrete: call split outside jit, "
            "and hand its result in, which is a pytree."
        )
    if pattern.row_index.ndim != 1:
        raise ValueError(
            f"the pattern's arrays carry {pattern.row_index.ndim - 1} leading axes: cut one layer of the stack at a "
            "time, jax.tree.map(lambda a: a[k], pattern)."
        )
