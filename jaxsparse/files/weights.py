"""The sparse weights among the arrays of a checkpoint, by how other libraries name their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse._indices import across, on_device
from jaxsparse.formats import BlockPattern


class SparseMatrix(NamedTuple):
    """A pattern and its values, which are None where a format stores none."""

    pattern: BlockPattern
    values: jax.Array | np.ndarray | None


def gather(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the parts of every sparse weight together; what is no part of one stays as it is.

    Weights are (out, in) in these formats, and become matrices (in, out) for `spmm`:

    - `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors: `w.compressed`, `w.bitmask`, `w.shape`, and of the
      first `w.row_offsets`. Bit c % 8 of byte c // 8, the least significant first, says whether entry c of a row is
      stored.
    - pytorch_block_sparse: `w.data`, whose square blocks stand transposed, `w.block_mask`, and four indices.

    Raises:
      ValueError: with the weight's name, where its parts don't fit together.
    """
    result: dict[str, Any] = dict(arrays)
    for name in [name.removesuffix(".bitmask") for name in arrays if name.endswith(".bitmask")]:
        result[name] = _named(name, _from_bitmask, _take(result, name, "compressed bitmask shape", "row_offsets"))
    for name in [name.removesuffix(".block_mask") for name in arrays if name.endswith(".block_mask")]:
        indices = "cols_a row_start_ends_a rows_b col_start_ends_b blocks"
        result[name] = _named(name, _from_block_mask, _take(result, name, "data block_mask cols_a", indices))
    return result


def _named(name: str, make, parts: dict[str, np.ndarray]) -> SparseMatrix:
    try:
        return make(**parts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _take(arrays: dict, name: str, needed: str, optional: str) -> dict[str, np.ndarray]:
    """Removes the parts of one weight."""
    missing = [part for part in needed.split() if f"{name}.{part}" not in arrays]
    if missing:
        raise ValueError(f"{name} has some parts of a sparse weight, but lacks {', '.join(missing)}.")
    found = [part for part in dict.fromkeys([*needed.split(), *optional.split()]) if f"{name}.{part}" in arrays]
    return {part: np.asarray(arrays.pop(f"{name}.{part}")) for part in found}


def _from_bitmask(compressed, bitmask, shape, row_offsets=None) -> SparseMatrix:
    out, size_in = _shape(shape)
    if bitmask.dtype != np.uint8 or bitmask.shape != (out, -(-size_in // 8)):
        raise ValueError(
            f"a weight of ({out}, {size_in}) takes a bitmask of uint8 ({out}, {-(-size_in // 8)}), got "
            f"{bitmask.dtype} {bitmask.shape}."
        )
    bits = np.unpackbits(bitmask, axis=1, bitorder="little").view(bool)
    if bits[:, size_in:].any():
        raise ValueError(f"the bitmask has bits set beyond the {size_in} inputs of a row.")
    out_ptr, stored = _bounds(bits), compressed.size
    if out_ptr[-1] != stored:
        raise ValueError(f"the bitmask has {out_ptr[-1]} bits set, but {stored} values are stored.")
    if row_offsets is not None and not np.array_equal(row_offsets.ravel(), out_ptr[:-1]):
        raise ValueError("row_offsets are not where the rows of the bitmask begin.")
    rows = (np.flatnonzero(bits.ravel()) % bits.shape[1]).astype(np.int32)
    out_ptr = out_ptr.astype(np.int32)
    index = on_device(out_ptr, rows, *across(out_ptr, rows, size_in))
    pattern = BlockPattern.of_index(index, (size_in, out), (1, 1))
    return SparseMatrix(pattern, compressed.reshape(-1))


def _from_block_mask(data, block_mask, cols_a, **rest) -> SparseMatrix:
    if data.ndim != 2 or block_mask.ndim != 2 or block_mask.dtype != bool:
        raise ValueError(f"data is {data.shape} and block_mask {block_mask.dtype} {block_mask.shape}: matrices needed.")
    (grid_out, grid_in), side = block_mask.shape, data.shape[1]
    cols, rows = np.nonzero(block_mask)
    if len(data) != side * len(rows):
        raise ValueError(
            f"{len(rows)} blocks of {side} x {side} take {side * len(rows)} rows of data, got {len(data)}."
        )
    if cols_a.shape != (len(rows), 2) or not np.array_equal(cols_a, np.stack([rows, np.arange(len(rows))], 1)):
        raise ValueError("cols_a is not what follows from block_mask.")
    if "row_start_ends_a" in rest and not np.array_equal(rest["row_start_ends_a"], _bounds(block_mask)):
        raise ValueError("row_start_ends_a is not what follows from block_mask.")
    pattern = BlockPattern.from_indices(rows, cols, shape=(grid_in * side, grid_out * side), block=side)
    return SparseMatrix(pattern, data.reshape(pattern.values_shape))


def _shape(shape: np.ndarray) -> tuple[int, int]:
    shape = shape.ravel()  # 2:4 writes it as a column
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any():
        raise ValueError(f"its shape must be two positive integers, got {shape.tolist()}.")
    return int(shape[0]), int(shape[1])


def _bounds(mask: np.ndarray) -> np.ndarray:
    """How many entries of a mask stand before each row, and in all."""
    return np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=1))])
