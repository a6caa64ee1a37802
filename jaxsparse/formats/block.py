"""`BlockPattern`: where the non-zeros of a sparse matrix are, as a frozen pytree of int32 arrays."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import _indices, _norms
from jaxsparse._indices import Index
from jaxsparse._sizes import as_pair, check_sizes, count_stored, grid_of, is_unstructured, swapped, values_shape

if TYPE_CHECKING:
    import scipy.sparse
    from jax.experimental import sparse as jsparse

    from jaxsparse.formats._parts import Parts


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which (i, o) blocks of an (in, out) matrix are stored; their values live apart, as `blocks`.

    The matrix is cut into a `grid` of blocks, padded at the far edges where a size is no multiple of
    the block. Entries are numbered by output column, then by input row: that is the order of `blocks`.
    Beside it stands the same pattern by input row, so that both products read their indices in sequence.

    A block of (1, 1) is an unstructured pattern: its values are `[nnz]` instead of `[nnz, 1, 1]`.
    Arrays are pytree leaves and sizes are static, so another pattern of equal size does not recompile.
    The constructors below validate, but for `of_index`, by which all others end.

    Attributes:
      col_ptr: int32 [grid_out + 1], entries of block column c are col_ptr[c] to col_ptr[c + 1].
      row_index: int32 [nnzb], the block row of each entry, ascending within its column; uint16 too
        (docs/performance.md, docs/gpu.md).
      row_ptr: int32 [grid_in + 1], the same bounds by block row.
      col_index: int32 [nnzb], the block column of each entry, row by row.
      order: int32 [nnzb], where in `blocks` the entries of `col_index` are.
      shape: (in, out) of the stored matrix's view: swapped by `.T`.
      block: (i, o), swapped by `.T`.
      transposed: whether this is a transposed view; the arrays then still describe the stored matrix.
    """

    col_ptr: Int[Array, " cols+1"]
    row_index: Int[Array, " nnzb"]
    row_ptr: Int[Array, " rows+1"]
    col_index: Int[Array, " nnzb"]
    order: Int[Array, " nnzb"]
    shape: tuple[int, int]
    block: tuple[int, int]
    transposed: bool = False

    # The names of the leaves carry the sizes, so that a checkpoint of another shape is refused by
    # every tool that compares tree paths (Orbax takes static fields from its target, unchecked).
    def tree_flatten_with_keys(self):
        sizes = "{}x{}_by_{}x{}".format(*self.shape, *self.block) + "_T" * self.transposed
        leaves = [(jax.tree_util.GetAttrKey(f"{name}_{sizes}"), getattr(self, name)) for name in Index._fields]
        return leaves, (self.shape, self.block, self.transposed)

    @classmethod
    def tree_unflatten(cls, static, leaves) -> BlockPattern:
        return cls.of_index(Index(*leaves), *static)

    def __repr__(self) -> str:
        rows, cols = self.shape
        if not getattr(self.row_index, "shape", ()):  # a tree of None, of specs or of dtypes
            return f"BlockPattern({rows}x{cols}, block={self.block})"
        view = ", transposed" * self.transposed
        return f"BlockPattern({rows}x{cols}, block={self.block}, nnzb={self.nnzb}, density={self.density:.3g}{view})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a small image."""
        from jaxsparse import _picture

        return _picture.as_html(self)

    # ---- sizes: all static ----------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along (in, out), the padded ones at the edge included."""
        return grid_of(self.shape, self.block)

    @property
    def nnzb(self) -> int:
        """Number of stored blocks."""
        return self.row_index.shape[-1]

    @property
    def stacked(self) -> int:
        """How many leading axes the arrays have: none, unless scan or vmap stacked several patterns."""
        return jnp.ndim(self.row_index) - 1

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of `blocks`: [nnz] for block (1, 1), else [nnzb, i, o]; a transposed view keeps it."""
        return values_shape(self.nnzb, swapped(self.block) if self.transposed else self.block)

    @property
    def is_unstructured(self) -> bool:
        """Whether it stores single entries: blocks of (1, 1)."""
        return is_unstructured(self.block)

    @property
    def density(self) -> float:
        """The fraction of blocks that is stored."""
        return self.nnzb / max(self.grid[0] * self.grid[1], 1)

    @property
    def fan_in(self) -> int:
        """Mean number of stored entries that feed an output, at least 1: what initialisers scale by."""
        return max(1, round(self.density * self.shape[0]))

    @property
    def fan_out(self) -> int:
        """Mean number of stored entries that an input feeds, at least 1."""
        return max(1, round(self.density * self.shape[1]))

    @property
    def T(self) -> BlockPattern:
        """The pattern of the transposed matrix: a view of the same arrays and the same `blocks`."""
        return self.of_index(self.index, swapped(self.shape), swapped(self.block), not self.transposed)

    @property
    def index(self) -> Index:
        """The arrays alone, as kernels take them; they describe the stored, untransposed matrix."""
        return Index(*(getattr(self, name) for name in Index._fields))

    @property
    def sizes(self) -> dict[str, Any]:
        """What products need to know beside the arrays: the sizes of the matrix as it is stored."""
        stored = self.T if self.transposed else self
        return {"shape": stored.shape, "block": stored.block, "transposed": self.transposed}

    @property
    def rows(self) -> Int[Array, " nnzb"]:
        """Block row (input) of every stored entry, in the order of `blocks`."""
        return _indices.stored_columns(self.index) if self.transposed else self.row_index

    @property
    def cols(self) -> Int[Array, " nnzb"]:
        """Block column (output) of every stored entry, in the order of `blocks`."""
        return self.row_index if self.transposed else _indices.stored_columns(self.index)

    # ---- constructors ---------------------------------------------------------------------------

    @classmethod
    def of_index(
        cls, index: Index, shape: tuple[int, int], block: tuple[int, int], transposed: bool = False
    ) -> BlockPattern:
        """The pattern of arrays that are known to be right: nothing is checked, so tracers and placeholders go too.

        Args:
          index: the five arrays, which describe the stored, untransposed matrix; a stack of patterns has leading axes.
          shape, block: those of the pattern's own view.
          transposed: whether that is the transposed one.
        """
        return cls(*index, shape, block, transposed)

    @classmethod
    def random(
        cls,
        key: jax.Array,
        shape: tuple[int, int],
        *,
        density: float,
        block: int | tuple[int, int] = (1, 1),
    ) -> BlockPattern:
        """A random pattern of exactly `round(density * grid_in * grid_out)` blocks.

        Every place of the grid is equally likely. Output columns get equal counts, to within one. A column
        with k entries takes one input from each of k equal strata, which a random amount rotates, so that its
        inputs are spread out. Time and memory are O(nnz), nothing depends on the key's value but the indices,
        so `jit`, `vmap` over keys and `eval_shape` work, and the result is the same jitted or not.

        Args:
          key: a JAX PRNG key.
          shape: (in, out) of the matrix.
          density: the fraction of blocks kept, 0 to 1; what is above 0 must keep one at least.
          block: (i, o), or b for (b, b).
        Raises:
          ValueError: for a density outside [0, 1], or above 0 that rounds to no block; a block larger than the
            matrix, sizes beyond int32.
        """
        shape, block = check_sizes(shape, block)
        count = count_stored(density, shape, block)
        return cls.of_index(_indices.stratified(key, grid_of(shape, block), count), shape, block)

    @classmethod
    def from_indices(cls, rows, cols, *, shape: tuple[int, int], block: int | tuple[int, int] = (1, 1)) -> BlockPattern:
        """The pattern with blocks at (rows[k], cols[k]), in block units, sorted by column, then by row.

        Raises:
          ValueError: for indices that are unsorted, duplicate, out of range or not integers.
        """
        shape, block = check_sizes(shape, block)
        rows, cols = np.asarray(rows), np.asarray(cols)
        grid = grid_of(shape, block)
        _indices.check_indices(rows, cols, grid)
        return cls.of_index(_indices.from_sorted(rows, cols, grid), shape, block)

    @classmethod
    def from_mask(cls, mask, block: int | tuple[int, int] = (1, 1)) -> BlockPattern:
        """The pattern of the blocks in which any entry of `mask`, elementwise and (in, out), is set."""
        mask = np.asarray(mask)
        if mask.ndim != 2:
            raise ValueError(f"a mask is a matrix (in, out), got {mask.ndim} dimensions of shape {mask.shape}.")
        shape, block = check_sizes(mask.shape, block)
        cols, rows = np.nonzero(_norms.in_blocks(mask != 0, block).any(axis=(1, 3)).T)
        return cls.from_indices(rows, cols, shape=shape, block=block)

    @classmethod
    def from_dense(cls, w, *, density: float, block: int | tuple[int, int] = (1, 1), score=None) -> BlockPattern:
        """The pattern of the blocks with the highest score; `gather(w)` then gives their values.

        Args:
          w: the dense matrix (in, out).
          density: the fraction of blocks *kept*.
          block: (i, o), or b for (b, b).
          score: one number per block, [grid_in, grid_out]; by default the L2 norm of the block.
            Of equal scores the earlier block, row by row, is kept.
        Raises:
          ValueError: if the score has another shape or holds NaN, and for densities as in `random`.
        """
        w = np.asarray(w)
        if w.ndim != 2:
            raise ValueError(f"w is a matrix (in, out), got {w.ndim} dimensions of shape {w.shape}.")
        shape, block = check_sizes(w.shape, block)
        if score is None:
            wide = w.astype(np.promote_types(np.float32, w.dtype) if w.dtype.kind == "f" else np.float32)
            score = _norms.squares_of_blocks(wide, block)
        score, grid = np.asarray(score), grid_of(shape, block)
        if score.shape != grid:
            raise ValueError(f"score has shape {score.shape}, but {shape} in blocks of {block} is a grid of {grid}.")
        if np.isnan(score).any():
            raise ValueError(f"score holds {np.isnan(score).sum()} NaN: which blocks to keep is undefined.")
        keep = _norms.highest(score.ravel(), count_stored(density, shape, block)).reshape(grid)
        cols, rows = np.nonzero(keep.T)
        return cls.from_indices(rows, cols, shape=shape, block=block)

    @classmethod
    def banded(cls, shape: tuple[int, int], bandwidth: int, block: int | tuple[int, int] = (1, 1)) -> BlockPattern:
        """The blocks (r, c) with |r - c| <= bandwidth, in block units."""
        shape, block = check_sizes(shape, block)
        if bandwidth < 0:
            raise ValueError(f"bandwidth={bandwidth} is negative; 0 is the diagonal alone.")
        grid = grid_of(shape, block)
        first = np.maximum(np.arange(grid[1]) - bandwidth, 0)
        counts = np.maximum(np.minimum(np.arange(grid[1]) + bandwidth + 1, grid[0]) - first, 0)
        cols = np.repeat(np.arange(grid[1]), counts)
        rows = np.arange(cols.size) - np.repeat(np.cumsum(counts) - counts, counts) + first[cols]
        return cls.from_indices(rows, cols, shape=shape, block=block)

    @classmethod
    def block_diagonal(cls, num_blocks: int, block: int | tuple[int, int]) -> BlockPattern:
        """`num_blocks` blocks of (i, o) along the diagonal of a (num_blocks*i, num_blocks*o) matrix."""
        i, o = as_pair(block)
        n = np.arange(operator.index(num_blocks))
        return cls.from_indices(n, n, shape=(num_blocks * i, num_blocks * o), block=(i, o))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BlockPattern:
        """The pattern of a dict that a saver made of one: its arrays under the names of its leaves, or with its sizes.

        That is what Orbax restores without a target, and `flax.serialization.to_state_dict`. A stack comes back as one.

        Raises:
          ValueError: for other keys, for leaves of different sizes, and unless all five arrays, which must be concrete,
            say the same pattern.
        """
        from jaxsparse.formats import states

        return states.from_state(state)

    def union(self, other: BlockPattern) -> BlockPattern:
        """The pattern of the blocks that either has; both must be concrete, of one shape and block."""
        if (self.shape, self.block) != (other.shape, other.block):
            raise ValueError(
                f"a union needs one shape and block, got {self.shape} by {self.block} "
                f"and {other.shape} by {other.block}."
            )
        places = [np.asarray(p.cols, np.int64) * self.grid[0] + np.asarray(p.rows) for p in (self, other)]
        cols, rows = np.divmod(np.union1d(*places), self.grid[0])
        return type(self).from_indices(rows, cols, shape=self.shape, block=self.block)

    def split(self, pieces: int, axis: int) -> Parts:
        """The pattern cut into pieces of one static size, one for each device along a mesh axis: see `Parts`.

        Axis 1 cuts the outputs (column parallel), axis 0 the inputs (row parallel).
        Raises ValueError for another axis, for no pieces, for a stack of patterns, and under a trace.
        """
        from jaxsparse.formats import _parts

        return _parts.split(self, pieces, axis)

    # ---- values ---------------------------------------------------------------------------------

    def gather(self, w: Float[Array, "in out"]) -> Float[Array, " *values"]:
        """The stored blocks of a dense matrix, zero beyond its edge: the inverse of `to_dense`."""
        if w.shape != self.shape:
            raise ValueError(f"gather wants a matrix of shape {self.shape}, got {w.shape}.")
        if self.transposed:
            return self.T.gather(w.T)
        if self.is_unstructured:
            return w[self.rows, self.cols]
        return _norms.in_blocks(w, self.block)[self.rows, :, self.cols]

    def to_dense(self, blocks: Float[Array, " *values"]) -> Float[Array, "in out"]:
        """The dense matrix, zeros where nothing is stored."""
        self.check_values(blocks)
        if self.transposed:
            return self.T.to_dense(blocks).T
        (i, o), grid = self.block, self.grid
        w = jnp.zeros((grid[0], i, grid[1], o), blocks.dtype)
        w = w.at[self.rows, :, self.cols].set(blocks.reshape(-1, i, o), unique_indices=True)
        return w.reshape(grid[0] * i, grid[1] * o)[: self.shape[0], : self.shape[1]]

    def to_mask(self) -> Bool[Array, "in out"]:
        """The elementwise mask of everything that is stored, block edges beyond the matrix cut off."""
        return self.to_dense(jnp.ones(self.values_shape, bool))

    def edge_mask(self) -> Bool[Array, " *values"] | None:
        """Which entries of `blocks` lie inside the matrix; None where all do."""
        stored = self.T if self.transposed else self
        (i, o), shape = stored.block, stored.shape
        if shape[0] % i == 0 and shape[1] % o == 0:
            return None
        inside_in = stored.rows[:, None] * i + jnp.arange(i) < shape[0]
        inside_out = stored.cols[:, None] * o + jnp.arange(o) < shape[1]
        return inside_in[:, :, None] & inside_out[:, None, :]

    def check_values(self, blocks) -> None:
        """Raises ValueError unless `blocks` has the shape that this pattern stores."""
        if jnp.shape(blocks) != self.values_shape:
            raise ValueError(
                f"blocks have shape {jnp.shape(blocks)}, but the pattern stores {self.values_shape}: "
                f"{self.nnzb} blocks of {self.values_shape[1:] or (1, 1)} in a {self.shape} matrix."
            )

    def flops(self, rows: int) -> int:
        """Operations of one product with `rows` inputs, a multiplication and an addition counting two, as XLA counts.

        Whole blocks count, at the edge too. A training step takes three products. XLA's own count, which Flax's
        `tabulate(compute_flops=True)` shows, sees nothing of a kernel (-1), and of back end "xla" what it expands too.
        """
        return 2 * rows * self.nnzb * self.block[0] * self.block[1]

    # ---- other libraries ------------------------------------------------------------------------

    @classmethod
    def from_scipy(cls, m: scipy.sparse.sparray | scipy.sparse.spmatrix) -> tuple[BlockPattern, Array]:
        """(pattern, blocks) of a SciPy matrix (in, out): blocks of a BSR matrix, else single entries, each once."""
        from jaxsparse.formats import interop

        return interop.from_scipy(m)

    def to_scipy(self, blocks: Float[Array, " *values"]) -> Any:
        """A SciPy BSR array; CSR where the block is (1, 1) or does not divide the matrix. No half dtypes."""
        from jaxsparse.formats import interop

        return interop.to_scipy(self, blocks)

    @classmethod
    def from_bcoo(cls, m: jsparse.BCOO) -> tuple[BlockPattern, Array]:
        """(pattern, blocks) of a JAX BCOO matrix with no batch and no dense dimensions; duplicates summed."""
        from jaxsparse.formats import interop

        return interop.from_bcoo(m)

    def to_bcoo(self, blocks: Float[Array, " *values"]) -> jsparse.BCOO:
        """A JAX BCOO matrix, entry by entry."""
        from jaxsparse.formats import interop

        return interop.to_bcoo(self, blocks)

    @classmethod
    def from_bcsr(cls, m: jsparse.BCSR) -> tuple[BlockPattern, Array]:
        """(pattern, blocks) of a JAX BCSR matrix with no batch and no dense dimensions; duplicates summed."""
        from jaxsparse.formats import interop

        return interop.from_bcsr(m)

    def to_bcsr(self, blocks: Float[Array, " *values"]) -> jsparse.BCSR:
        """A JAX BCSR matrix, entry by entry."""
        from jaxsparse.formats import interop

        return interop.to_bcsr(self, blocks)
