"""Where a layer stores: drawn for a density without JAX, or taken from a pattern, a mask or a dense weight with it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jaxsparse._arguments import check_fits, check_one, refuse_empty
from jaxsparse._sizes import check_sizes, count_stored, grid_of
from torch_bridge import _dense, _draw

if TYPE_CHECKING:
    from jaxsparse.formats import BlockPattern


@dataclasses.dataclass(frozen=True)
class Stored:
    """A pattern as tensors on the CPU.

    Attributes:
      index: its five arrays, in the order of `_whole.NAMES`.
      shape, block, transposed: as in BlockPattern.
    """

    index: tuple[Tensor, ...]
    shape: tuple[int, int]
    block: tuple[int, int]
    transposed: bool = False

    @property
    def values_shape(self) -> tuple[int, ...]:
        nnzb, (i, o) = self.index[1].shape[0], self.block
        return (nnzb,) if (i, o) == (1, 1) else (nnzb, o, i) if self.transposed else (nnzb, i, o)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the matrix as it is stored, in blocks."""
        rows, cols = grid_of(self.shape, self.block)
        return (cols, rows) if self.transposed else (rows, cols)


def asked_for(shape: tuple[int, int], density, block, pattern, mask) -> Stored:
    """What exactly one of `density`, `pattern` and `mask` asks for, of an (in, out) matrix.

    Raises:
      ValueError: if they are not one, and for what does not fit.
    """
    given = check_one(density, pattern, mask)
    if given == "density":
        return _drawn(shape, density, block)
    pattern = pattern if given == "pattern" else of_mask(mask, shape, block)
    check_fits(pattern, shape, given)
    from torch_bridge.dlpack import jax_to_torch

    return Stored(tuple(jax_to_torch(tuple(pattern.index))), pattern.shape, pattern.block, pattern.transposed)


def chosen(w: Tensor, density, block, pattern, mask) -> BlockPattern:
    """The same of a dense weight (in, out), whose blocks of largest norm a density keeps."""
    from jaxsparse.formats import BlockPattern

    given = check_one(density, pattern, mask)
    if given == "density":
        return BlockPattern.from_dense(_dense.to_numpy(w), density=density, block=block)  # pyright: ignore[reportArgumentType]
    return pattern if given == "pattern" else of_mask(mask, (w.shape[0], w.shape[1]), block)


def of_mask(mask: Any, shape: tuple[int, int], block) -> BlockPattern:
    """The pattern of a torch-like (out, in) mask."""
    from jaxsparse.formats import BlockPattern

    mask = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if getattr(mask, "shape", None) != shape[::-1]:
        raise ValueError(
            f"the mask has shape {getattr(mask, 'shape', None)}, but must be (out_features, in_features) = "
            f"{shape[::-1]}, as the weight of torch.nn.Linear is. Transpose it, or make one of that shape."
        )
    return BlockPattern.from_mask(mask.T, block)


def _drawn(shape: tuple[int, int], density: float, block) -> Stored:
    refuse_empty(density, shape)
    shape, block = check_sizes(shape, block)
    return Stored(_draw.random_index(grid_of(shape, block), count_stored(density, shape, block)), shape, block)
