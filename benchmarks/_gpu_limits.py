"""What an H100 allows at best in a cell of `gpu.py`, by bytes and operations: predictions, made before any measurement.

Every product takes as long as the busiest of arithmetic, memory (each array moved once), the second-level cache (all
that the programs of a kernel load) and shared memory (what arrives there, and what products read). Programs without
work wait for the last ones. Launches, and whatever a kernel does worse than its limit, come on top.
"""

from __future__ import annotations

import jax.numpy as jnp

from benchmarks._gpu_cells import Cell
from pallas_kernels.mosaic import configs
from pallas_kernels.triton.crossover import HALF, LEVEL_2, MEMORY, dense_seconds, seconds


def predicted_ms(cell: Cell) -> dict[str, float]:
    """Milliseconds of ours and of what it competes with, of one layer."""
    limits = {"blocks": _blocks, "block-diagonal": _diagonal, "unstructured": _expanded}
    found = _streamed(cell) if cell.layers > 1 else limits[cell.family](cell)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def _blocks(cell: Cell) -> dict[str, float]:
    stored = cell.density * cell.shape[0] * cell.shape[1]
    ours = sum(_product(cell, stored, _loaded(cell, mode)) for mode in _products(cell)) + _update(cell, stored)
    return {"ours": ours, "dense": _dense(cell)}


def _diagonal(cell: Cell) -> dict[str, float]:
    """Bias and gelu cost an unfused product another trip of y through memory."""
    stored = cell.density * cell.shape[0] * cell.shape[1]
    ours = len(_products(cell)) * _product(cell, stored) + _update(cell, stored)
    return {"ours": ours, "unfused": ours + 2 * _item(cell) * cell.batch * cell.shape[1] / MEMORY}


def _expanded(cell: Cell) -> dict[str, float]:
    """What XLA's compiler makes of it: the columns of the entries, by a scatter; the dense weight, which is written for
    y and dx together; the dense gradient, of which sectors of 32 bytes that hold an entry are read."""
    size, item = cell.shape[0] * cell.shape[1], _item(cell)
    nnz = cell.density * size
    columns, weight = 16 * nnz, item * size + (8 + item) * nnz
    gradient = item * size * (2 - (1 - cell.density) ** (32 // item)) + (8 + item) * nnz
    extra = columns + (weight if cell.mode != "dW" else 0) + (gradient if cell.mode in ("dW", "step") else 0)
    ours = len(_products(cell)) * _product(cell, size) + extra / MEMORY + _update(cell, nnz)
    return {"ours": ours, "dense": _dense(cell)}


def _streamed(cell: Cell) -> dict[str, float]:
    nnz, item = round(cell.density * cell.shape[0] * cell.shape[1]), _item(cell)
    ours = {
        f"ours, {bits}-bit indices": seconds(cell.batch, cell.shape, nnz, itemsize=item, index=bits // 8)
        for bits in (32, 16)
    }
    return {**ours, "dense": dense_seconds(cell.batch, cell.shape, itemsize=item)}


def _dense(cell: Cell) -> float:
    size = cell.shape[0] * cell.shape[1]
    return len(_products(cell)) * _product(cell, size) + _update(cell, size)


def _products(cell: Cell) -> tuple[str, ...]:
    return ("forward", "dX", "dW") if cell.mode == "step" else (cell.mode,)


def _product(cell: Cell, stored: float, loaded: float = 0) -> float:
    moved = _item(cell) * (stored + cell.batch * sum(cell.shape))
    return max(2 * cell.batch * stored / HALF, moved / MEMORY, loaded / LEVEL_2)


def _update(cell: Cell, stored: float) -> float:
    """SGD reads weight and gradient, and writes the weight."""
    return 3 * _item(cell) * stored / MEMORY if cell.mode == "step" else 0


def _loaded(cell: Cell, mode: str) -> float:
    """Bytes that the programs of a Mosaic kernel load, all together, or more that take as long as its products."""
    (i, o), m, item = cell.block, cell.batch, _item(cell)
    grid = cell.shape[0] // i, cell.shape[1] // o
    nnzb = cell.density * grid[0] * grid[1]
    if mode == "dW":
        sizes = m, i, o, round(nnzb), *grid
        c = configs.for_sample(*sizes)
        return max(configs.sampled(c, *sizes), configs.sampled_through_shared_memory(c, *sizes)) * item / 2
    inner, width, lines, features = (
        (i, o, grid[1], cell.shape[0]) if mode == "forward" else (o, i, grid[0], cell.shape[1])
    )
    sizes = m, features, inner, width, lines, round(nnzb)
    return configs.taken(configs.for_gather(*sizes), *sizes) * item / 2


def _item(cell: Cell) -> int:
    return jnp.dtype(cell.dtype).itemsize
