"""The sizes of a sparse matrix: checked, and counted in blocks. Knows no arrays."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

INT32_MAX = 2**31 - 1


def as_pair(block) -> tuple[int, int]:
    """(i, o) of a block given as a pair or as one int."""
    try:
        is_one = not isinstance(block, Sequence) and getattr(block, "ndim", 0) == 0
        sizes: Any = (block, block) if is_one else block
        i, o = map(operator.index, sizes)
    except (TypeError, ValueError):
        raise ValueError(f"block={block!r} is neither an int nor a pair of ints.") from None
    if i < 1 or o < 1:
        raise ValueError(f"block=({i}, {o}) must be at least (1, 1).")
    return i, o


def swapped(pair: tuple[int, int]) -> tuple[int, int]:
    """(in, out) of the transpose."""
    return pair[1], pair[0]


def is_unstructured(block: tuple[int, int]) -> bool:
    """Whether single entries are stored: blocks of (1, 1), which have kernels and a shape of values of their own."""
    return block == (1, 1)


def values_shape(nnzb: int, block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the values of `nnzb` stored blocks: [nnzb, i, o], of single entries [nnz]."""
    return (nnzb,) if is_unstructured(block) else (nnzb, *block)


def check_sizes(shape, block) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shape and block as pairs of ints, or a ValueError that says what does not fit."""
    try:
        rows, cols = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"shape={shape!r} is not a pair of ints (in, out).") from None
    block = as_pair(block)
    for name, size, b in (("in", rows, block[0]), ("out", cols, block[1])):
        if not 1 <= size <= INT32_MAX:
            raise ValueError(f"{name}={size} is outside 1 to {INT32_MAX}: indices are int32.")
        if b > size:
            raise ValueError(
                f"a block of {block} is larger than the matrix {(rows, cols)}: {b} > {name}={size}. "
                f"Use a block of at most {(min(block[0], rows), min(block[1], cols))}."
            )
    return (rows, cols), block


def grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks along (in, out), the padded ones at the edge included."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def count_kept(density: float, blocks: int) -> int:
    """How many of `blocks` a density keeps: round(density * blocks), checked against int32."""
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} is outside [0, 1]: it is the fraction of the weights that is kept.")
    count = round(float(density) * blocks)
    if count > INT32_MAX:
        raise ValueError(
            f"density={density} of {blocks} blocks keeps {count}, more than int32 can index ({INT32_MAX}). "
            "Use larger blocks, a lower density, or split the matrix."
        )
    return count


def count_stored(density: float, shape: tuple[int, int], block: tuple[int, int]) -> int:
    """How many blocks a new pattern stores: `count_kept` of its grid, which is 0 for a density of 0 alone."""
    blocks = math.prod(grid_of(shape, block))
    count = count_kept(density, blocks)
    if count == 0 and density > 0:
        smaller = "" if is_unstructured(block) else ", or smaller blocks"
        raise ValueError(
            f"density={density} keeps nothing of a {shape} (in, out) matrix, which is {blocks} blocks of {block}: "
            f"{density} x {blocks} = {float(density) * blocks:.3g}, rounded 0. Give a density of at least "
            f"1 / {blocks} = {1 / blocks:.3g}{smaller}; density=0 if nothing is to be stored."
        )
    return count
