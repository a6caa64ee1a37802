"""The product of one torch layer: its sizes, and the way through JAX, which is imported when that is first taken."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch

from torch_bridge._handles import new_handle
from torch_bridge._views import NO_VIEWS, Views
from torch_bridge._whole import NAMES

if TYPE_CHECKING:
    from torch_bridge.function import TracedFunction

KEPT = ("bias", "weight", *(f"index[{k}]" for k in range(len(NAMES))))  # operands that stay where they are; x does not
NAME = "a sparse linear layer"


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


class ThroughJax:
    """A product in JAX, of the keyword arguments bias, index (None for a block-diagonal weight), weight and x.

    Attributes:
      handle: the name by which a compiled graph calls it.
    """

    def __init__(self, product: Product):
        self.product = product
        self.handle = new_handle(self, NAME)

    def __reduce__(self):  # compiled code is no part of a pickle
        return through_jax, (self.product,)

    def __deepcopy__(self, memo):  # it has no state: copies of a layer share its compiled code
        return self

    def __call__(self, operands: dict[str, Any], views: Views = NO_VIEWS) -> Any:
        if torch.compiler.is_compiling():
            from torch_bridge.compile import in_graph

            return in_graph(self.handle, (), operands)
        return self.function((), operands, views)

    def in_graph(self, args: tuple, kwargs: dict) -> Any:
        """The same on tensors of a graph that is being made."""
        return self.function.in_graph(args, kwargs)

    @functools.cached_property
    def function(self) -> TracedFunction:
        from torch_bridge._in_jax import traced

        return traced(self.product)


@functools.cache
def through_jax(product: Product) -> ThroughJax:
    return ThroughJax(product)
