"""`NMPattern`: which n of every m neighbouring inputs are stored, as a frozen pytree of one array of bits."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt

from jaxsparse import _groups
from jaxsparse._sizes import check_sizes, swapped
from jaxsparse.formats.block import BlockPattern

MOST = 32  # inputs of a group: a bit of an integer for each


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class NMPattern:
    """Which n of every m neighbouring inputs of each output are stored, as 2:4; their values live apart.

    Values are `[groups, n, out]`: of each group of m inputs the stored ones in ascending order. They take n / m of the
    dense matrix, and a bit an entry says where they are: of 2:4 in float32 that is 56 % of the bytes, of 4:8 53 %.

    The last group is filled up where `in` is no multiple of m; values beyond the edge are zero and get zero gradients.
    `bits` is a pytree leaf and sizes are static, so another pattern of equal size does not recompile.

    Attributes:
      bits: uint8 [groups, out] (uint32 for m above 8); bit k says that input k of the group is stored. n are set.
      n: how many are stored.
      m: of how many, at most 32.
      shape: (in, out) of the stored matrix's view: swapped by `.T`.
      transposed: whether this is a transposed view; the array then still describes the stored matrix.
    """

    bits: UInt[Array, "groups out"]
    n: int
    m: int
    shape: tuple[int, int]
    transposed: bool = False

    # As in BlockPattern, the name of the leaf carries the sizes.
    def tree_flatten_with_keys(self):
        name = "bits_{}of{}_{}x{}".format(self.n, self.m, *self.shape) + "_T" * self.transposed
        return [(jax.tree_util.GetAttrKey(name), self.bits)], (self.n, self.m, self.shape, self.transposed)

    @classmethod
    def tree_unflatten(cls, static, leaves) -> NMPattern:
        return cls(*leaves, *static)

    def __repr__(self) -> str:
        rows, cols = self.shape
        return f"NMPattern({rows}x{cols}, {self.n}:{self.m}{', transposed' * self.transposed})"

    # ---- sizes: all static ----------------------------------------------------------------------

    @property
    def stacked(self) -> int:
        """How many leading axes the array has: none, unless scan or vmap stacked several patterns."""
        return jnp.ndim(self.bits) - 2

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of the values, [groups, n, out]; a transposed view keeps it."""
        size_in, out = self._stored_shape
        return _groups.groups_of(size_in, self.m), self.n, out

    @property
    def density(self) -> float:
        """The fraction that is stored."""
        return self.n / self.m

    @property
    def fan_in(self) -> int:
        """Mean number of stored entries that feed an output, at least 1: what initialisers scale by."""
        return max(1, round(self.density * self.shape[0]))

    @property
    def fan_out(self) -> int:
        """Mean number of stored entries that an input feeds, at least 1."""
        return max(1, round(self.density * self.shape[1]))

    @property
    def T(self) -> NMPattern:
        """The pattern of the transposed matrix: a view of the same array and the same values."""
        return dataclasses.replace(self, shape=swapped(self.shape), transposed=not self.transposed)

    @property
    def index(self) -> tuple[UInt[Array, "groups out"]]:
        """The arrays alone, as products take them."""
        return (self.bits,)

    @property
    def sizes(self) -> dict[str, Any]:
        """What products need to know beside the arrays: the sizes of the matrix as it is stored."""
        return {"n": self.n, "m": self.m, "shape": self._stored_shape, "transposed": self.transposed}

    @property
    def _stored_shape(self) -> tuple[int, int]:
        return swapped(self.shape) if self.transposed else self.shape

    # ---- constructors ---------------------------------------------------------------------------

    @classmethod
    def random(cls, key: jax.Array, shape: tuple[int, int], *, n: int, m: int) -> NMPattern:
        """A pattern of which every choice of n inputs of a group is equally likely. Traceable.

        Raises:
          ValueError: unless 1 <= n <= m <= 32, and for sizes beyond int32.
        """
        shape = _check(shape, n, m)
        score = jax.random.uniform(key, (_groups.groups_of(shape[0], m), m, shape[1]))
        return cls._of(score, n, m, shape)

    @classmethod
    def from_dense(cls, w, *, n: int, m: int, score=None) -> NMPattern:
        """The pattern of the n entries of each group with the highest score; `gather(w)` then gives their values.

        Args:
          w: the dense matrix (in, out).
          score: one number per entry, (in, out); by default the magnitude. Of equal scores the earlier entry is kept.
        Raises:
          ValueError: if the score has another shape or holds NaN, and as `random` does.
        """
        w = np.asarray(w)
        shape = _check(w.shape, n, m)
        score = np.abs(w.astype(np.promote_types(np.float32, w.dtype))) if score is None else np.asarray(score)
        if score.shape != shape:
            raise ValueError(
                f"score has shape {score.shape}, but the matrix is {shape}: one number an entry is needed."
            )
        if np.isnan(score).any():
            raise ValueError(f"score holds {np.isnan(score).sum()} NaN: which entries to keep is undefined.")
        return cls._of(_groups.in_groups(score, m), n, m, shape)

    @classmethod
    def from_mask(cls, mask, *, n: int, m: int) -> NMPattern:
        """The pattern of a mask (in, out) that has exactly n entries set in each group.

        A group at the edge of fewer than n inputs has all of them set.
        Raises:
          ValueError: for another number in any group, and as `random` does.
        """
        mask = np.asarray(mask) != 0
        shape = _check(mask.shape, n, m)
        marks = _groups.in_groups(mask, m)
        counts = marks.sum(1)
        right = np.minimum(n, shape[0] - m * np.arange(len(marks)))[:, None]
        wrong = counts != right
        if wrong.any():
            group, out = np.argwhere(wrong)[0]
            raise ValueError(
                f"inputs {group * m} to {min(group * m + m, shape[0]) - 1} of output {out} have {counts[group, out]} "
                f"entries set, and {right[group, 0]} are needed of {n}:{m} ({np.count_nonzero(wrong)} such groups). "
                f"NMPattern.from_dense(w, n={n}, m={m}) keeps the largest weights of each."
            )
        return cls._of(marks.astype(np.float32), n, m, shape)

    @classmethod
    def from_bits(cls, bits, *, n: int, m: int, shape: tuple[int, int], transposed: bool = False) -> NMPattern:
        """The pattern, or the stack of them, of the attributes of one, as a file holds them: checked, and copied.

        Raises:
          ValueError: for bits of another dtype or shape, for a group of which not n of m are set, and as `random` does.
        """
        shape, bits = _check(shape, n, m), np.asarray(bits)
        stored = swapped(shape) if transposed else shape
        dtype, sizes = _groups.dtype_of_bits(m), (_groups.groups_of(stored[0], m), stored[1])
        if bits.dtype != dtype or bits.shape[-2:] != sizes:
            raise ValueError(
                f"bits are {bits.dtype} of shape {bits.shape}, but {n}:{m} of a {stored} matrix needs {dtype} {sizes}."
            )
        marks = np.unpackbits(bits[..., None].view(np.uint8), axis=-1, bitorder="little")
        wrong = (marks.sum(-1) != n) | marks[..., m:].any(-1)
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            raise ValueError(f"bits{list(at)} is {bits[at]:b}, of which {n} of the {m} lowest bits must be set.")
        return cls(jnp.array(bits), n, m, shape, transposed)

    @classmethod
    def from_pattern(cls, pattern: BlockPattern, values, *, n: int, m: int) -> tuple[NMPattern, Array]:
        """(pattern, values) of single entries, at most n in each group; what is missing to n is stored as zeros.

        Raises:
          ValueError: for blocks, for a group of more than n entries, and as `random` does.
        """
        if not pattern.is_unstructured:
            raise ValueError(f"the pattern has blocks of {pattern.block}: {n}:{m} is made of single entries.")
        mask = np.asarray(pattern.to_mask())
        counts = _groups.in_groups(mask, m).sum(1)
        if counts.max(initial=0) > n:
            group, out = np.unravel_index(np.argmax(counts), counts.shape)
            raise ValueError(
                f"inputs {group * m} to {group * m + m - 1} of output {out} have {counts[group, out]} entries, more "
                f"than {n}:{m} holds. NMPattern.from_dense(pattern.to_dense(values), n={n}, m={m}) keeps the largest."
            )
        made = cls.from_dense(mask, n=n, m=m)
        return made, made.gather(pattern.to_dense(jnp.asarray(values)))

    def to_pattern(self, values: Float[Array, "groups n out"]) -> tuple[BlockPattern, Array]:
        """(pattern, values) of the same matrix as single entries; the pattern must be concrete."""
        self.check_values(values)
        pattern = BlockPattern.from_mask(self.to_mask())
        return pattern, pattern.gather(self.to_dense(values))

    @classmethod
    def _of(cls, score, n: int, m: int, shape: tuple[int, int]) -> NMPattern:
        """Of the scores [groups, m, out], all positive: what lies beyond the edge is kept last."""
        inside = np.arange(score.shape[0] * m).reshape(-1, m, 1) < shape[0]
        xp = np if isinstance(score, np.ndarray) else jnp
        stored = _groups.highest(xp.where(inside, score, -xp.inf), n)
        return cls(_groups.to_bits(stored), n, m, shape)

    # ---- values ---------------------------------------------------------------------------------

    def gather(self, w: Float[Array, "in out"]) -> Float[Array, "groups n out"]:
        """The stored values of a dense matrix, zero beyond its edge: the inverse of `to_dense`."""
        if w.shape != self.shape:
            raise ValueError(f"gather wants a matrix of shape {self.shape}, got {w.shape}.")
        return _groups.compress(jnp.asarray(w.T if self.transposed else w), self.bits, self.n, self.m)

    def to_dense(self, values: Float[Array, "groups n out"]) -> Float[Array, "in out"]:
        """The dense matrix, zeros where nothing is stored."""
        self.check_values(values)
        w = _groups.expand(jnp.asarray(values), self.bits, self.m, self._stored_shape[0])
        return w.T if self.transposed else w

    def to_mask(self) -> Bool[Array, "in out"]:
        """The elementwise mask of everything that is stored inside the matrix."""
        return self.to_dense(jnp.ones(self.values_shape, bool))

    def edge_mask(self) -> Bool[Array, "groups n out"] | None:
        """Which values lie inside the matrix; None where all do."""
        if self._stored_shape[0] % self.m == 0:
            return None
        return self.gather(jnp.ones(self.shape, bool))

    def check_values(self, values) -> None:
        """Raises ValueError unless `values` have the shape that this pattern stores."""
        if jnp.shape(values) != self.values_shape:
            raise ValueError(
                f"values have shape {jnp.shape(values)}, but the pattern stores {self.values_shape}: {self.n} of every "
                f"{self.m} inputs of a {self._stored_shape} matrix."
            )

    def flops(self, rows: int) -> int:
        """Operations of one product with `rows` inputs, a multiplication and an addition counting two."""
        groups, n, out = self.values_shape
        return 2 * rows * groups * n * out


def _check(shape, n: int, m: int) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"a matrix (in, out) is needed, got shape {tuple(shape)}.")
    shape, _ = check_sizes(shape, (1, 1))
    if not 1 <= operator.index(n) <= operator.index(m) <= MOST:
        raise ValueError(f"n={n} of m={m}: 1 <= n <= m <= {MOST} is needed.")
    return shape
