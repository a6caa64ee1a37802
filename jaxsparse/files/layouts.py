"""Where torch's sparse tensors store, of every layout. They are read by their methods: torch is not imported."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxsparse._indices import by_column, check_coordinates, lines_of
from jaxsparse._sizes import grid_of
from jaxsparse.formats import BlockPattern

LAYOUTS = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")


class Placed(NamedTuple):
    """A sparse tensor (out, in), as weights are in torch.

    Attributes:
      pattern: of the matrix (in, out).
      values: as the tensor stores them, [nnz] or blocks [nnz, out, in].
      order: the places of `values` in the order of the pattern.
    """

    pattern: BlockPattern
    values: Any
    order: np.ndarray


def place(w: Any) -> Placed:
    """Checks a sparse tensor and gives its pattern. Entries that a COO tensor has twice are summed, as torch says.

    Raises:
      ValueError: for another layout or more dimensions, and for indices that are no matrix.
    """
    layout = layout_of(w)
    if layout not in LAYOUTS or w.ndim != 2:
        raise ValueError(
            f"the weight is a torch.{layout} tensor of {w.ndim} dimensions, and must be sparse_csr, sparse_bsr or "
            "another sparse one of two. Use weight.to_sparse_csr() or weight.to_sparse_bsr(block)."
        )
    (out, size_in), w = (int(size) for size in w.shape), w.detach()
    if layout == "sparse_coo":
        indices = _host(w._indices())
        if indices.shape[0] != 2:
            raise ValueError(f"the COO weight has {indices.shape[0]} sparse dimension, and must have two.")
        check_coordinates(indices[1], indices[0], (size_in, out))  # before torch sums what stands twice
        w = w.coalesce()
        (cols, rows), values, block = _host(w.indices()), w.values(), (1, 1)
    else:
        values = w.values()
        if values.ndim != (1 if layout in ("sparse_csr", "sparse_csc") else 3):
            raise ValueError(f"the torch.{layout} weight has values of shape {tuple(values.shape)}: no plain matrix.")
        block = (1, 1) if values.ndim == 1 else (int(values.shape[2]), int(values.shape[1]))
        if 0 in block or size_in % block[0] or out % block[1]:
            raise ValueError(
                f"the torch.{layout} weight has values of shape {tuple(values.shape)}: blocks of {block[1]} x "
                f"{block[0]} do not divide its shape {(out, size_in)}."
            )
        rows, cols = _compressed(w, layout, values, block, grid_of((size_in, out), block))
    grid = grid_of((size_in, out), block)
    check_coordinates(rows, cols, grid)
    order = by_column(rows, cols, grid)
    return Placed(BlockPattern.from_indices(rows[order], cols[order], shape=(size_in, out), block=block), values, order)


def layout_of(w: Any) -> str:
    """The layout's name, without "torch."."""
    return str(w.layout).removeprefix("torch.")


def _compressed(w: Any, layout: str, values: Any, block: tuple[int, int], grid: tuple[int, int]):
    """(rows, columns) of the (in, out) matrix, in blocks."""
    by_out = layout in ("sparse_csr", "sparse_bsr")
    name = "crow_indices" if by_out else "ccol_indices"
    ptr, other = getattr(w, name)(), (w.col_indices if by_out else w.row_indices)()
    if ptr.ndim != 1 or other.ndim != 1:
        raise ValueError(f"the torch.{layout} weight is a batch of matrices, and must be one.")
    other = _host(other)
    line = lines_of(_host(ptr), grid[1 if by_out else 0], other, values, f"{name} of the torch.{layout} weight")
    return (other, line) if by_out else (line, other)


def _host(t: Any) -> np.ndarray:
    return t.detach().cpu().numpy()
