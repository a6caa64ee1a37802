"""Two kernels make every product: a gather of blocks along an output line, and a product sampled at the entries.

Tiles are powers of two, masked at the edges of blocks and of the matrix, so that any size works.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._epilogue import ACTIVATIONS, wide
from pallas_kernels._lines import Lines


class Axis(NamedTuple):
    """A window of `size` places from `start`, of which those below `end` exist."""

    start: jax.Array | int
    size: int
    end: jax.Array | int


def gather(x, blocks, lines: Lines, bias, *, out: int, transposed: bool, activation, precision, interpret: bool):
    """y[:, line] = activation(sum over the entries e of the line  x[:, source[e]] @ blocks[slot[e]]  +  bias[line]).

    Args:
      x: [m, features] and `blocks` [nnzb, i, o], which are read as [o, i] if `transposed`.
      lines: the entries of every output block.
      bias: [out] or None.
    Returns:
      [m, out] in the dtype of `x`. One program makes one tile of y and walks over its entries.
    """
    m, features = x.shape
    inner, width = blocks.shape[:0:-1] if transposed else blocks.shape[1:]
    tile_m, tile_n, tile_k = _tile(m, 64), _tile(width, 128), _tile(inner, 128 // x.dtype.itemsize)
    steps, parts = pl.cdiv(inner, tile_k), pl.cdiv(width, tile_n)

    def kernel(x_ref, w_ref, ptr_ref, source_ref, slot_ref, *rest):
        *bias_ref, y_ref = rest
        line, part = _divide(pl.program_id(0), parts)
        first = ptr_ref[line]
        rows = Axis(pl.program_id(1) * tile_m, tile_m, m)
        across = Axis(part * tile_n, tile_n, width)

        def step(s, total):
            entry, k = _divide(s, steps)
            source, slot = source_ref[first + entry], slot_ref[first + entry]
            end = jnp.minimum(inner, features - source * inner)  # a block at the edge reaches beyond the matrix
            along = Axis(k * tile_k, tile_k, end)
            values = (
                _load(w_ref, across, along, at=(slot,)).T if transposed else _load(w_ref, along, across, at=(slot,))
            )
            return total + _dot(_load(x_ref, rows, _shift(along, source * inner)), values, precision)

        total = jnp.zeros((tile_m, tile_n), wide(x.dtype))
        total = jax.lax.fori_loop(0, (ptr_ref[line + 1] - first) * steps, step, total)
        columns = _shift(across, line * width)
        columns = columns._replace(end=jnp.minimum(columns.end, out))
        if bias_ref:
            total = total + _load(bias_ref[0], columns).astype(total.dtype)[None, :]
        _store(y_ref, rows, columns, value=ACTIVATIONS[activation](total))

    operands = (x, blocks, *lines) if bias is None else (x, blocks, *lines, bias)
    grid = (lines.ptr.shape[0] - 1) * parts, pl.cdiv(m, tile_m)
    return call(kernel, "gather", (m, out), x.dtype, grid, interpret)(*operands)


def sample(x, dy, entries, block: tuple[int, int], *, precision, interpret: bool):
    """values[slot[e]] = x[:, row[e]]^T dy[:, column[e]] for every entry (row, column, slot).

    Args:
      x: [m, in] and `dy` [m, out], of one dtype.
      entries: three int32 arrays [nnzb].
    Returns:
      [nnzb, i, o] in the dtype of `x`, zero beyond the matrix. One program makes one tile of one block.
    """
    m, (i, o), nnzb = x.shape[0], block, entries[0].shape[0]
    tile_i, tile_o, tile_m = _tile(i, 128), _tile(o, 64), _tile(m, 128 // x.dtype.itemsize)
    parts = pl.cdiv(o, tile_o)

    def kernel(x_ref, dy_ref, row_ref, column_ref, slot_ref, values_ref):
        entry, part = pl.program_id(0), _divide(pl.program_id(1), parts)
        row, column, slot = row_ref[entry], column_ref[entry], slot_ref[entry]
        down, across = Axis(part[0] * tile_i, tile_i, i), Axis(part[1] * tile_o, tile_o, o)

        def step(s, total):
            batch = Axis(s * tile_m, tile_m, m)
            left = _load(x_ref, batch, _clip(_shift(down, row * i), x.shape[1]))
            right = _load(dy_ref, batch, _clip(_shift(across, column * o), dy.shape[1]))
            return total + _dot(left.T, right, precision)

        total = jnp.zeros((tile_i, tile_o), wide(x.dtype))
        total = jax.lax.fori_loop(0, pl.cdiv(m, tile_m), step, total)
        _store(values_ref, down, across, value=total, at=(slot,))

    grid = nnzb, pl.cdiv(i, tile_i) * parts
    return call(kernel, "sample", (nnzb, i, o), x.dtype, grid, interpret)(x, dy, *entries)


def call(kernel, name: str, shape, dtype, grid, interpret: bool, warps: int = 4):
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        compiler_params=None if interpret else plt.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name=f"jaxsparse_{name}",
    )


def _tile(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16, the least a tensor core takes, to `most`."""
    return min(most, max(16, pl.next_power_of_2(size)))


def _divide(a, b: int):
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))


def _shift(axis: Axis, by) -> Axis:
    return Axis(axis.start + by, axis.size, axis.end + by)


def _clip(axis: Axis, end: int) -> Axis:
    return axis._replace(end=jnp.minimum(axis.end, end))


def _load(ref, *axes: Axis, at=()):
    """The window of `ref`, zero where it leaves the axes' ends."""
    window, inside = _window(axes)
    return plt.load(ref.at[(*at, *window)], mask=inside, other=0)


def _store(ref, *axes: Axis, value, at=()):
    window, inside = _window(axes)
    plt.store(ref.at[(*at, *window)], value.astype(ref.dtype), mask=inside)


def _window(axes: tuple[Axis, ...]):
    """The slices of a window, and which of its places exist."""
    sizes, inside = tuple(axis.size for axis in axes), jnp.ones((), bool)
    for d, axis in enumerate(axes):
        inside = inside & (axis.start + jax.lax.broadcasted_iota(jnp.int32, sizes, d) < axis.end)
    return tuple(pl.ds(axis.start, axis.size) for axis in axes), inside


def _dot(a, b, precision):
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=wide(a.dtype)
    )
