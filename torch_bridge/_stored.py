"""Where a layer stores: drawn for a density, or taken from a mask, a dense weight, or a pattern, which brings JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from jaxsparse._arguments import check_fits, check_one, refuse_empty
from jaxsparse._norms import highest, in_blocks, squares_of_blocks
from jaxsparse._sizes import check_sizes, count_stored, grid_of, is_unstructured, swapped, values_shape
from torch_bridge import _dense, _draw


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
        return values_shape(self.index[1].shape[0], swapped(self.block) if self.transposed else self.block)

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
    if isinstance(pattern, Stored):  # by `chosen`
        return pattern
    given = check_one(density, pattern, mask)
    if given == "density":
        return _drawn(shape, density, block)
    if given == "mask":
        return of_mask(mask, shape, block)
    check_fits(pattern, shape, given)
    from torch_bridge.dlpack import jax_to_torch

    return Stored(tuple(jax_to_torch(tuple(pattern.index))), pattern.shape, pattern.block, pattern.transposed)


def chosen(w: Tensor, density, block, pattern, mask) -> Stored:
    """The same of a dense weight (in, out), whose blocks of largest norm a density keeps."""
    shape = w.shape[0], w.shape[1]
    if check_one(density, pattern, mask) != "density":
        return asked_for(shape, None, block, pattern, mask)
    shape, block = check_sizes(shape, block)
    refuse_empty(density, shape)
    score = squares_of_blocks(_dense.to_numpy(w), block)
    if np.isnan(score).any():
        raise ValueError(f"the weight has NaN in {np.isnan(score).sum()} blocks: which ones to keep is undefined.")
    keep = highest(score.ravel(), count_stored(density, shape, block))
    return _of_marks(keep.reshape(score.shape), shape, block)


def of_mask(mask: Any, shape: tuple[int, int], block) -> Stored:
    """Where any entry of a torch-like (out, in) mask is set."""
    mask = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if getattr(mask, "shape", None) != shape[::-1]:
        raise ValueError(
            f"the mask has shape {getattr(mask, 'shape', None)}, but must be (out_features, in_features) = "
            f"{shape[::-1]}, as the weight of torch.nn.Linear is. Transpose it, or make one of that shape."
        )
    shape, block = check_sizes(shape, block)
    marked = np.asarray(mask).T != 0
    return _of_marks(marked if is_unstructured(block) else in_blocks(marked, block).any(axis=(1, 3)), shape, block)


def _of_marks(marked: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> Stored:
    """The blocks that are marked on the grid."""
    cols, rows = np.divmod(np.flatnonzero(marked.T), len(marked))  # half the time of np.nonzero
    return Stored(_draw.index_of(rows, cols, grid_of(shape, block)), shape, block)


def _drawn(shape: tuple[int, int], density: float, block) -> Stored:
    refuse_empty(density, shape)
    shape, block = check_sizes(shape, block)
    return Stored(_draw.random_index(grid_of(shape, block), count_stored(density, shape, block)), shape, block)
