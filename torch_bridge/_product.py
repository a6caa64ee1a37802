"""The product of one torch layer, as a function of arrays that equal layers share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxsparse import ops
from jaxsparse.formats import BlockPattern
from torch_bridge.function import TracedFunction


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static about a layer's product. Equal ones share their compiled code."""

    values_shape: tuple[int, ...]
    shape: tuple[int, int] = (0, 0)
    block: tuple[int, int] = (0, 0)
    transposed: bool = False
    precision: Any = None
    backend: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.shape, *self.block, int(self.transposed))

    @property
    def stored(self) -> tuple[tuple[int, int, int, int], bool]:
        """The sizes (in, out, i, o) of the matrix as it is stored, and whether its transpose is meant."""
        (rows, cols), (i, o) = self.shape, self.block
        return ((cols, rows, o, i), True) if self.transposed else ((rows, cols, i, o), False)

    def pattern(self, index) -> BlockPattern:
        return BlockPattern.tree_unflatten((self.shape, self.block, self.transposed), index)

    def __call__(self, *, bias, index, weight, x):
        options = {"precision": self.precision, "backend": self.backend}
        if index is None:
            return ops.block_diag_matmul(x, weight, bias, **options)
        return ops.spmm(x, weight, self.pattern(index), bias, **options)


edge_mask = jax.jit(BlockPattern.edge_mask)


@functools.cache
def traced(product: Product) -> TracedFunction:
    return TracedFunction(product, "a sparse linear layer")
