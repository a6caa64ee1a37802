"""What a torch layer takes from JAX: its product as a function of arrays, and its pattern."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jaxsparse import ops
from jaxsparse._indices import Index
from jaxsparse.formats import BlockPattern
from torch_bridge._product import NAME, Product
from torch_bridge.dlpack import torch_to_jax
from torch_bridge.function import TracedFunction


def traced(product: Product) -> TracedFunction:
    """The product as torch calls it."""
    return TracedFunction(functools.partial(_multiply, product), NAME)


def copied_pattern(product: Product, index: Sequence[Tensor]) -> BlockPattern:
    """The pattern in memory of its own."""
    return _pattern(product, torch_to_jax(tuple(index)))


def _pattern(product: Product, index: Sequence[Any]) -> BlockPattern:
    return BlockPattern.of_index(Index(*index), product.shape, product.block, product.transposed)


def _multiply(product: Product, *, bias, index, weight, x):
    options = {"precision": product.precision, "backend": product.backend}
    if index is None:
        return ops.block_diag_matmul(x, weight, bias, **options)
    return ops.spmm(x, weight, _pattern(product, index), bias, **options)
