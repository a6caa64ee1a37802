"""Products with single entries, for the small batches of inference: entries are streamed once, x is gathered.

The batch lies along the vectors: x is transposed once per call, so that what an entry multiplies is one run of
memory. A program takes a few lines and walks over their entries, a chunk of each line at a time; every line is
summed in a fixed order. Indices may be of any integer dtype: at 16 bits an entry costs 4 bytes, at 32 bits 6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._epilogue import ACTIVATIONS, wide
from pallas_kernels._lines import Lines
from pallas_kernels.triton.kernels import call

NUMBERS = 2048  # of a program's tile: 16 in each of 128 threads; no configuration has been timed
CACHED = 2**17  # bytes of x that stay in the first-level cache of a multiprocessor, which has 256 KiB on an H100
SECTOR = 32  # bytes that a gather reads at least


class Tile(NamedTuple):
    """What a program does at once: so many entries of each of so many lines, for so many rows of x."""

    lines: int
    entries: int
    batch: int

    @property
    def warps(self) -> int:
        return min(4, max(1, self.lines * self.entries * self.batch // 512))


def gather(x, values, of: Lines, bias, *, activation, interpret: bool, numbers: int = NUMBERS):
    """y[:, line] = activation(sum over the entries e of the line  x[:, source[e]] * values[slot[e]]  +  bias[line]).

    Args:
      x: [m, features] and `values` [nnz], of one dtype.
      of: the entries of every output; without a slot, entry e has values[e] and values are read in sequence. With
        one, every value costs a sector of 32 bytes.
      bias: [out] or None.
      numbers: how many a program holds at once.
    Returns:
      [m, out] in the dtype of `x`. float32 is multiplied as float32, never as tf32.
    """
    m, out = x.shape[0], of.ptr.shape[0] - 1
    tile = choose_tile(m, x.shape[1], out, of.source.shape[0], x.dtype.itemsize, numbers)

    def kernel(x_ref, values_ref, of, bias_ref, y_ref):
        line, first, last = _bounds(of.ptr, tile.lines)
        part = pl.program_id(1)

        def step(s, total):
            at, inside = _chunk(first, last, s, tile.entries, of.source.shape[0])
            slot = at if of.slot is None else plt.load(of.slot.at[at], mask=inside, other=0)
            value = plt.load(values_ref.at[slot], mask=inside, other=0).astype(total.dtype)
            source = plt.load(of.source.at[at], mask=inside, other=0).astype(jnp.int32)
            return total + value[:, :, None] * _rows(x_ref, part, source, inside).astype(total.dtype)

        total = jnp.zeros(tile, wide(x.dtype))
        y = jax.lax.fori_loop(0, _steps(first, last, tile.entries), step, total).sum(1)
        if bias_ref is not None:
            y += plt.load(bias_ref.at[line], mask=line < out, other=0).astype(y.dtype)[:, None]
        row, line = part * tile.batch + _iota(y.shape, 1), jnp.broadcast_to(line[:, None], y.shape)
        inside = (row < m) & (line < out)
        plt.store(y_ref.at[row, line], ACTIVATIONS[activation](y).astype(x.dtype), mask=inside)

    grid = pl.cdiv(out, tile.lines), pl.cdiv(m, tile.batch)
    run = call(kernel, "gather_entries", (m, out), x.dtype, grid, interpret, tile.warps)
    return run(_batch_last(x, tile.batch), values, of, bias)


def sample(x, dy, of: Lines, *, interpret: bool):
    """values[e] = the product of column source[e] of x and column line of dy, for every entry e of every line.

    Args:
      x: [m, in] and `dy` [m, out], of one dtype.
      of: the entries of every column of dy, in the order of `values`.
    Returns:
      [nnz] in the dtype of `x`.
    """
    nnz, out = of.source.shape[0], of.ptr.shape[0] - 1
    tile = choose_tile(x.shape[0], x.shape[1], out, nnz, x.dtype.itemsize)
    parts, total_dtype = pl.cdiv(x.shape[0], tile.batch), wide(x.dtype)

    def kernel(x_ref, dy_ref, of, values_ref):
        line, first, last = _bounds(of.ptr, tile.lines)

        def step(s, _):
            at, inside = _chunk(first, last, s, tile.entries, nnz)
            source = plt.load(of.source.at[at], mask=inside, other=0).astype(jnp.int32)

            def part(p, total):
                right = _rows(dy_ref, p, line, line < out).astype(total_dtype)
                return total + (_rows(x_ref, p, source, inside).astype(total_dtype) * right[:, None, :]).sum(2)

            total = jax.lax.fori_loop(0, parts, part, jnp.zeros(at.shape, total_dtype))
            plt.store(values_ref.at[at], total.astype(x.dtype), mask=inside)

        jax.lax.fori_loop(0, _steps(first, last, tile.entries), step, None)

    run = call(kernel, "sample_entries", (nnz,), x.dtype, (pl.cdiv(out, tile.lines),), interpret, tile.warps)
    return run(_batch_last(x, tile.batch), _batch_last(dy, tile.batch), of)


def choose_tile(m: int, features: int, lines: int, nnz: int, itemsize: int, numbers: int = NUMBERS) -> Tile:
    """The whole batch, or what of it stays cached; about a line of entries; several lines where those are short."""
    batch, cached = min(64, pl.next_power_of_2(m)), CACHED // (features * itemsize)
    if batch > cached >= SECTOR // itemsize // 2:  # with less, too much of what is gathered would be read in vain
        batch = 1 << (cached.bit_length() - 1)
    entries = min(numbers // batch, pl.next_power_of_2(pl.cdiv(nnz, lines)))
    return Tile(min(8, numbers // batch // entries), entries, batch)


def _batch_last(x, batch: int):
    """x [m, features] as [parts, features, batch], zero beyond m."""
    m, features = x.shape
    parts = pl.cdiv(m, batch)
    return jnp.pad(x, ((0, parts * batch - m), (0, 0))).reshape(parts, batch, features).swapaxes(1, 2)


def _bounds(ptr_ref, lines: int):
    """The program's lines, and the first and last entry of each; lines beyond the matrix have none."""
    line = pl.program_id(0) * lines + _iota((lines,), 0)
    inside = line < ptr_ref.shape[0] - 1
    return line, *(plt.load(ptr_ref.at[line + k], mask=inside, other=0) for k in (0, 1))


def _steps(first, last, entries: int):
    return jax.lax.div(jnp.max(last - first) + entries - 1, jnp.int32(entries))


def _chunk(first, last, s, entries: int, nnz: int):
    """Chunk s of the entries of every line, and which of them exist; the others are beyond the last entry of all."""
    at = first[:, None] + s * entries + _iota((first.shape[0], entries), 1)
    inside = at < last[:, None]
    return jnp.where(inside, at, nnz), inside


def _rows(ref, part, feature, inside):
    """The batch of some features, [*feature, batch]."""
    shape = *feature.shape, ref.shape[-1]
    at = part, jnp.broadcast_to(feature[..., None], shape), _iota(shape, len(shape) - 1)
    return plt.load(ref.at[at], mask=jnp.broadcast_to(inside[..., None], shape), other=0)


def _iota(shape, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
