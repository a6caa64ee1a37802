"""The weight gradient of small blocks: a program sums several neighbouring pieces of W at once.

A piece is 64 rows of W, which is what a tensor core makes at least, and as many columns as a tile of dy has: a block,
or several small ones. A band of W is some pieces high. Those of its pieces that store a block, column by column, are
cut into groups. A program takes a group, loads each tile of x and of dy that one of its pieces needs once, and
multiplies it for all of them. Where there are few groups, each is cut along the batch, and XLA adds up the sums of the
parts in their order, so that the same inputs give the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import Device
from pallas_kernels._lines import entries_of
from pallas_kernels.mosaic._pipeline import COMPUTE, Pipeline, barriers, divide, launch, specialise
from pallas_kernels.mosaic.configs import PIECE, Supertile

HALF = 2**15  # two numbers of tiles are kept in one


class Groups(NamedTuple):
    """The pieces that store a block, in groups; the arrays have room for as many groups as there can be.

    Attributes:
      number: [1], how many groups there are.
      band: [groups], which band a group lies in.
      mask: [groups], with a bit for each row of the band that the group needs.
      column: [groups, pieces / 2], which tiles of dy the group needs, and then tiles beyond dy, two in a number.
      at: [groups, pieces], row of the band * pieces + position in `column`, of each piece.
      slot: [groups, pieces, blocks of a piece], where those blocks lie, or nnzb where none is stored.
    """

    number: jax.Array
    band: jax.Array
    mask: jax.Array
    column: jax.Array
    at: jax.Array
    slot: jax.Array


def grouped(index: Any, block: tuple[int, int], columns: int, config: Supertile) -> Groups:
    """The groups of a pattern with so many block columns."""
    (i, o), c, nnzb = block, config, index.order.shape[0]
    high, wide, rows = PIECE // i, c.tile_o // o, index.row_ptr.shape[0] - 1
    pieces, tiles = pl.cdiv(rows, high), pl.cdiv(columns, wide)  # down and across the whole matrix
    bands = pl.cdiv(pieces, c.rows)
    cells = bands * tiles * c.rows
    most = (min(nnzb, cells) + bands * (c.pieces - 1)) // c.pieces

    row, column, slot = entries_of(index)
    (piece, down), (tile, across) = divide(row, high), divide(column, wide)
    band, row = divide(piece, c.rows)
    slots = jnp.full((cells + 1, high * wide), nnzb, jnp.int32)
    slots = slots.at[(band * tiles + tile) * c.rows + row, down * wide + across].set(slot, unique_indices=True)
    stored = (slots[:cells] < nnzb).any(1).reshape(bands, -1)
    groups = pl.cdiv(stored.sum(1, dtype=jnp.int32), c.pieces)
    first = c.pieces * (jnp.cumsum(groups, dtype=jnp.int32) - groups)
    rank = jnp.where(stored, first[:, None] + jnp.cumsum(stored, 1, dtype=jnp.int32) - 1, most * c.pieces)
    cell = jnp.full(most * c.pieces, cells, jnp.int32)
    cell = cell.at[rank.ravel()].set(jnp.arange(cells, dtype=jnp.int32), mode="drop").reshape(most, c.pieces)

    have, group, (line, row) = cell < cells, jnp.arange(most)[:, None], divide(cell, c.rows)
    begins = have & (line != jnp.pad(line[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
    position = jnp.cumsum(begins, 1, dtype=jnp.int32) - 1
    band, tile = divide(line, tiles)

    def listed(length: int, at, values, otherwise: int):
        at = jnp.where(have, at, length)
        return jnp.full((most, length), otherwise, jnp.int32).at[group, at].set(values, mode="drop")

    rows_read = listed(c.rows, row, 1, 0) << jnp.arange(c.rows, dtype=jnp.int32)
    left, right = jnp.moveaxis(listed(c.pieces, position, tile, tiles).reshape(most, -1, 2), 2, 0)
    return Groups(
        number=groups.sum(dtype=jnp.int32)[None],
        band=jnp.where(have[:, 0], band[:, 0], 0),
        mask=rows_read.sum(1, dtype=jnp.int32),
        column=(left * HALF + right).ravel(),
        at=jnp.where(have, row * c.pieces + position, 0).ravel(),
        slot=slots[cell].ravel(),
    )


def supertile(x, dy, index: Any, block: tuple[int, int], config: Supertile, device: Device):
    """What `sample.sample` computes, from the same arguments, for blocks that fit into a piece."""
    m, nnzb, (i, o), c = x.shape[0], index.order.shape[0], block, config
    groups = grouped(index, block, pl.cdiv(dy.shape[1], o), c)
    high, wide, most = PIECE // i, c.tile_o // o, groups.band.shape[0]
    whole, own = pl.cdiv(m, c.tile_m), c.pieces // COMPUTE
    share, beyond = pl.cdiv(whole, c.splits), pl.cdiv(x.shape[1], PIECE)

    def kernel(x_ref, dy_ref, number_ref, band_ref, mask_ref, column_ref, at_ref, slot_ref, values_ref, *scratch):
        xs, dys, out, loaded, freed = scratch
        pipeline = Pipeline(loaded, freed, c.stages)

        def place(item):
            """The part of the batch, the group, and the first step and number of steps; no part where no item is."""
            part, group = jax.lax.div(item, number_ref[0]), jax.lax.rem(item, number_ref[0])
            steps = jnp.clip(whole - part * share, 0, share)
            return part, group, part * share, jnp.where(part < c.splits, steps, 0)

        def load(item, done):
            _, group, first, steps = place(item)

            def step(s, done):  # which reads again what it loads: the registers are too few to keep it
                band, mask = band_ref[group], mask_ref[group]
                tiles = [column_ref[group * (c.pieces // 2) + p] for p in range(c.pieces // 2)]
                stage, batch = pipeline.wait_until_free(done), pl.ds((first + s) * c.tile_m, c.tile_m)
                for r in range(c.rows):
                    read = jax.lax.rem(jax.lax.shift_right_logical(mask, r), 2) == 1
                    piece = jnp.where(read, band * c.rows + r, beyond)  # TMA fills in zeros
                    reads = x_ref.at[batch, pl.ds(piece * PIECE, PIECE)]
                    plgpu.copy_gmem_to_smem(reads, xs.at[stage, r], loaded.at[stage])
                for p, tile in enumerate(half for both in tiles for half in divide(both, HALF)):
                    reads = dy_ref.at[batch, pl.ds(tile * c.tile_o, c.tile_o)]
                    plgpu.copy_gmem_to_smem(reads, dys.at[stage, p], loaded.at[stage])
                return done + 1

            return jax.lax.fori_loop(0, steps, step, done)

        def multiply(item, done):
            part, group, _, steps = place(item)
            mine = jax.lax.axis_index("wg")
            pieces = [group * c.pieces + COMPUTE * p + mine for p in range(own)]

            def scoped(*accs):
                def step(s, done):
                    places = [divide(at_ref[piece], c.pieces) for piece in pieces]
                    stage = pipeline.wait_until_loaded(done)
                    for acc, (row, column) in zip(accs, places, strict=True):
                        plgpu.wgmma(acc, xs.at[stage, row].transpose((1, 0)), dys.at[stage, column])
                    plgpu.wgmma_wait(0)  # there are few stages: each is freed as soon as it can be
                    pipeline.free(done)
                    return done + 1

                return jax.lax.fori_loop(0, steps, step, done), *(acc[...] for acc in accs)

            accumulator = plgpu.WGMMAAccumulatorRef((PIECE, c.tile_o), jnp.float32)
            done, *totals = pl.run_scoped(scoped, *[accumulator] * own)
            for piece, total in zip(pieces, totals, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before has left
                for k in range(wide):  # apart, as a block is copied from one place
                    out[mine, k] = total[:, k * o : (k + 1) * o].astype(values.dtype)
                plgpu.commit_smem()
                for k in range(high * wide):
                    slot = slot_ref[piece * high * wide + k]
                    source = out.at[mine, k % wide, pl.ds(k // wide * i, i)]
                    wanted = jnp.logical_and(slot < nnzb, part < c.splits)
                    target = values_ref.at[jnp.minimum(part * nnzb + slot, c.splits * nnzb - 1)]
                    pl.when(wanted)(lambda source=source, target=target: plgpu.copy_smem_to_gmem(source, target))
            return done

        specialise(most * c.splits, pipeline.drain, load, multiply)

    values = jax.ShapeDtypeStruct((c.splits * nnzb, i, o), jnp.float32 if c.splits > 1 else x.dtype)
    width = min(c.tile_m, c.tile_o)  # of the layout in shared memory: a product sums as many rows at least
    layout = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * x.dtype.itemsize)
    scratch = (
        plgpu.SMEM((c.stages, c.rows, c.tile_m, PIECE), x.dtype, transforms=layout),
        plgpu.SMEM((c.stages, c.pieces, c.tile_m, c.tile_o), x.dtype, transforms=layout),
        plgpu.SMEM((COMPUTE, wide, PIECE, o), values.dtype),
        *barriers(c.stages, c.rows + c.pieces),
    )
    how = {"programs": device.multiprocessors, "cluster": 1, "approximate": False}
    parts = launch(kernel, values, scratch, "sample_supertile", **how)(x, dy, *groups)
    return parts.reshape(c.splits, nnzb, i, o).sum(0).astype(x.dtype) if c.splits > 1 else parts
