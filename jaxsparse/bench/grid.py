"""The cells of a grid, and the arrays of one of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.formats import BlockPattern

DTYPES = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
DTYPES |= {"float16": "float16", "f16": "float16", "float64": "float64", "f64": "float64"}


class Cell(NamedTuple):
    """One layer: sizes, rows of the input, where its weights are and what share of all they are, and what is timed.

    Attributes:
      block: the side of the blocks, 1 for single entries; 0 where they are diagonal.
      diagonal: the number of diagonal blocks, or 0; then `density` is 1 / diagonal.
    """

    size_in: int
    size_out: int
    batch: int
    block: int
    dtype: str
    train: bool
    density: float
    diagonal: int = 0

    @property
    def group(self) -> tuple:
        """What cells have in common that differ in their density alone."""
        return self[:6]

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Of diagonal blocks."""
        return self.diagonal, self.size_in // self.diagonal, self.size_out // self.diagonal

    def describe(self) -> str:
        blocks = f"blocks of {self.block}x{self.block}" if self.block else "diagonal blocks"
        blocks = "single entries" if self.block == 1 else blocks
        what = "training step" if self.train else "forward"
        return f"{self.size_in}x{self.size_out}, batch {self.batch}, {blocks}, {self.dtype}, {what}"


def cells(
    sizes_in: Sequence[int],
    sizes_out: Sequence[int],
    batches: Sequence[int],
    blocks: Sequence[int],
    densities: Sequence[float],
    dtype: str,
    train: bool,
    diagonal: Sequence[int] | None = None,
) -> list[Cell]:
    """The whole grid; without output sizes, each input size is the output's too. Densities vary fastest.

    Args:
      diagonal: numbers of diagonal blocks, in the place of blocks and densities.
    Raises:
      ValueError: for sizes that are none, blocks larger than a matrix, a density outside ]0, 1], numbers of diagonal
        blocks that do not divide a size, an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    numbers = {"in": sizes_in, "out": sizes_out, "batch": batches, "block": blocks, "diagonal": diagonal or ()}
    where = {"block": blocks, "density": densities} if diagonal is None else {"diagonal": diagonal}
    for name, values in {"in": sizes_in, "batch": batches, **where}.items():
        if not values:
            raise ValueError(f"--{name} has no value.")
    for name, values in numbers.items():
        if wrong := [value for value in values if value < 1]:
            raise ValueError(f"{name} {wrong[0]} is less than 1.")
    if wrong := [d for d in densities if not 0 < d <= 1]:
        raise ValueError(f"density {wrong[0]} is outside 0 to 1: it is the share of the weights that is kept.")
    shapes = [(i, o) for i in sizes_in for o in (sizes_out or [i])]
    if wrong := [(shape, b) for shape in shapes for b in blocks if b > min(shape)]:
        raise ValueError("a block of {1} is larger than a matrix of {0[0]}x{0[1]}.".format(*wrong[0]))
    if wrong := [(shape, n) for shape in shapes for n in diagonal or () if shape[0] % n or shape[1] % n]:
        raise ValueError("{1} diagonal blocks do not divide a matrix of {0[0]}x{0[1]}.".format(*wrong[0]))
    kinds = [(*kind, 0) for kind in itertools.product(blocks, densities)]
    if diagonal is not None:
        kinds = [(0, 1 / n, n) for n in diagonal]
    grid = itertools.product(shapes, batches, kinds)
    return [Cell(*shape, batch, b, DTYPES[dtype], train, d, n) for shape, batch, (b, d, n) in grid]


class Problem:
    """The arrays of a cell, drawn from a fixed seed; the large ones are made when they are asked for.

    Attributes:
      x, dy: [batch, in] and [batch, out].
      pattern, values: the weight. Diagonal blocks are stored as `block_diag_matmul` takes them, [n, i, o], which is
        also the order of the pattern.
    """

    def __init__(self, cell: Cell):
        rng = np.random.default_rng(0)
        self.shape = cell.size_in, cell.size_out
        self.pattern = _pattern(cell)
        sizes = (cell.batch, cell.size_in), (cell.batch, cell.size_out), self.pattern.values_shape
        self.x, self.dy, self.values = (rng.standard_normal(s, np.float32).astype(jnp.dtype(cell.dtype)) for s in sizes)
        inside = self.pattern.edge_mask()
        if inside is not None:
            self.values = np.where(np.asarray(inside), self.values, np.zeros((), self.values.dtype))

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """[in, out]."""
        return np.asarray(self.pattern.to_dense(jnp.asarray(self.values)))

    @functools.cached_property
    def mask(self) -> np.ndarray:
        return np.asarray(self.pattern.to_mask())

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """The first rows of x W, in float64."""
        return self.x[:4].astype(np.float64) @ self.dense.astype(np.float64)


def _pattern(cell: Cell) -> BlockPattern:
    if cell.diagonal:
        n, i, o = cell.values_shape
        return BlockPattern.block_diagonal(n, (i, o))
    return BlockPattern.random(jax.random.key(0), (cell.size_in, cell.size_out), density=cell.density, block=cell.block)
