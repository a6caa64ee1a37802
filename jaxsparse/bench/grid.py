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
DTYPES |= {"float16": "float16", "f16": "float16"}


class Cell(NamedTuple):
    """One layer: sizes, rows of the input, share of the weights, block (1 for single entries), and what is timed."""

    size_in: int
    size_out: int
    batch: int
    block: int
    dtype: str
    train: bool
    density: float

    @property
    def group(self) -> tuple:
        """What cells have in common that differ in their density alone."""
        return self[:-1]

    def describe(self) -> str:
        blocks = "single entries" if self.block == 1 else f"blocks of {self.block}x{self.block}"
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
) -> list[Cell]:
    """The whole grid; without output sizes, each input size is the output's too. Densities vary fastest.

    Raises:
      ValueError: for sizes that are none, blocks larger than a matrix, a density outside ]0, 1], an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    numbers = {"in": sizes_in, "out": sizes_out, "batch": batches, "block": blocks}
    for name, values in {**numbers, "out": sizes_in, "density": densities}.items():
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
    grid = itertools.product(shapes, batches, blocks, densities)
    return [Cell(*shape, batch, block, DTYPES[dtype], train, density) for shape, batch, block, density in grid]


class Problem:
    """The arrays of a cell, drawn from a fixed seed; the large ones are made when they are asked for.

    Attributes:
      x, dy: [batch, in] and [batch, out].
      pattern, values: the weight.
    """

    def __init__(self, cell: Cell):
        rng = np.random.default_rng(0)
        self.shape = cell.size_in, cell.size_out
        self.pattern = BlockPattern.random(jax.random.key(0), self.shape, density=cell.density, block=cell.block)
        drawn = [rng.standard_normal(size, np.float32) for size in self._sizes(cell)]
        self.x, self.dy, self.values = (a.astype(jnp.dtype(cell.dtype)) for a in drawn)
        inside = self.pattern.edge_mask()
        if inside is not None:
            self.values = np.where(np.asarray(inside), self.values, np.zeros((), self.values.dtype))

    def _sizes(self, cell: Cell) -> tuple[tuple[int, ...], ...]:
        return (cell.batch, cell.size_in), (cell.batch, cell.size_out), self.pattern.values_shape

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
