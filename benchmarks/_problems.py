"""The grid of workloads, and for each of them the numbers that every contender of a cell gets."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from jaxsparse import BlockPattern
from jaxsparse._sizes import is_unstructured

RATE = 1e-12  # of every optimizer: contenders share their weights, which should stay what the check expects
LARGEST_DENSE = 1e9  # bytes of one dense weight; what would need more says so instead of running


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of a table: who is fastest at this?"""

    family: str
    batch: int
    shape: tuple[int, int]
    density: float
    block: tuple[int, int] = (1, 1)
    mode: str = "forward"  # or "training": forward, dX, dW, optimizer
    optimizer: str = "sgd"  # or "adam"
    num_blocks: int = 0  # of a block-diagonal matrix; 0: the pattern is random

    @property
    def label(self) -> str:
        mode = "forward" if self.mode == "forward" else f"training ({self.optimizer})"
        if self.num_blocks:
            return f"F={self.block[0]} M={self.num_blocks} batch {self.batch}, {mode}"
        kind = "" if is_unstructured(self.block) else f"blocks {self.block[0]}x{self.block[1]} "
        return f"{kind}{self.density:.0%} batch {self.batch} {self.shape[0]}x{self.shape[1]}, {mode}"

    @property
    def stored(self) -> int:
        """Weights that the matrix stores."""
        if self.num_blocks:
            return self.num_blocks * self.block[0] * self.block[1]
        return round(self.density * self.shape[0] * self.shape[1])

    @property
    def useful_flops(self) -> int:
        return 2 * self.batch * self.stored * (3 if self.mode == "training" else 1)


class Problem:
    """The input, the upstream gradient and the weights of a cell; forward and training share one."""

    def __init__(self, cell: Cell):
        rng = np.random.default_rng(0)
        if cell.num_blocks:
            self.pattern = BlockPattern.block_diagonal(cell.num_blocks, cell.block)
        else:
            self.pattern = BlockPattern.random(jax.random.key(0), cell.shape, density=cell.density, block=cell.block)
        self.num_blocks, self.density = cell.num_blocks, cell.density
        self.x = rng.standard_normal((cell.batch, cell.shape[0]), np.float32)
        self.dy = rng.standard_normal((cell.batch, cell.shape[1]), np.float32)
        self.values = rng.standard_normal(self.pattern.values_shape, np.float32) / np.float32(self.pattern.fan_in**0.5)

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """The weight as (in, out), zeros where nothing is stored."""
        size = 4 * self.pattern.shape[0] * self.pattern.shape[1]
        if size > LARGEST_DENSE:
            raise MemoryError(f"a dense weight of {size / 1e9:.1f} GB")
        return np.array(self.pattern.to_dense(self.values))

    @functools.cached_property
    def mask(self) -> np.ndarray:
        return np.array(self.pattern.to_mask(), np.float32)

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """What every contender's first rows must be."""
        x = self.x[:4].astype(np.float64)
        if self.num_blocks:
            x = x.reshape(len(x), self.num_blocks, -1)
            return np.einsum("bmi,mio->bmo", x, self.values).reshape(len(x), -1)
        return x @ self.dense


def grid(quick: bool) -> dict[str, list[Cell]]:
    """All cells by family. The quick grid has every family, at sizes that say nothing about speed."""
    n, batch = (64, 16) if quick else (2048, 256)
    unstructured = [Cell("unstructured", batch, (n, n), d) for d in ((0.1,) if quick else (0.05, 0.1, 0.25))]
    blocks = [
        Cell("blocks", batch, (n, n), density, (b, b))
        for b in ((16,) if quick else (8, 16, 32, 64, 128))
        for density in ((0.5,) if quick else (0.1, 0.25, 0.5))
    ]
    small = [Cell("small batch", b, (n if quick else 4096,) * 2, 0.1) for b in ((1,) if quick else (1, 8))]
    shapes = [(48, 64)] if quick else [(784, 1024), (1024, 4096), (3072, 768)]
    large = [Cell("large batch", 128 if quick else 8192, shape, 0.1) for shape in shapes]
    diagonal = [
        Cell("block-diagonal", 16 if quick else 128, (m * f, m * f), 1 / m, (f, f), num_blocks=m)
        for f in ((16,) if quick else (64, 256, 1024, 2048, 4096))
        for m in ((2,) if quick else (1, 2, 4, 8, 16))
    ]
    first = [Cell("first call", batch, (n, n), 0.25, (n // 4, n // 4), num_blocks=4)]
    if not quick:
        first += [Cell("first call", batch, (n, n), 0.1, block) for block in ((1, 1), (32, 32))]
    return {
        "unstructured": [*_both(unstructured), *_adam(unstructured)],
        "blocks": _both(blocks),
        "small batch": small,
        "large batch": _both(large),
        "block-diagonal": _both(diagonal),
        "first call": _both(first),
    }


def _both(cells: list[Cell]) -> list[Cell]:
    return [dataclasses.replace(c, mode=mode) for c in cells for mode in ("forward", "training")]


def _adam(cells: list[Cell]) -> list[Cell]:
    return [dataclasses.replace(c, mode="training", optimizer="adam") for c in cells]
