"""The weight gradient as one warp-specialised, persistent kernel for Hopper: x^T dy, only where W is stored.

An item of work is two neighbouring pieces of one block row, one for each warpgroup that multiplies: they share
the tile of x, which is read transposed out of shared memory. The sum runs over the whole batch in one place, so
that the same inputs give the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import Device
from pallas_kernels.mosaic._pipeline import COMPUTE, Pipeline, barriers, divide, launch, specialise
from pallas_kernels.mosaic.configs import Sample


def sample(x, dy, index: Any, block: tuple[int, int], config: Sample, device: Device):
    """values[slot] = x[:, row]^T dy[:, column] for every entry of a pattern.

    Args:
      x: [m, in] and `dy` [m, out] of whole blocks, bfloat16 or float16, m a multiple of 8.
      index: the int32 arrays of a block pattern.
      config: sizes of tiles. A tensor core makes 64 rows at least: a block with fewer is a part of a tile.
    Returns:
      [nnzb, i, o] in the dtype of `x`.
    """
    m, nnzb, (i, o), c = x.shape[0], index.order.shape[0], block, config
    rows, across, down = index.row_ptr.shape[0] - 1, o // c.tile_o, max(1, i // c.tile_i)
    steps, pairs = pl.cdiv(m, c.tile_m), (nnzb * across + rows) // COMPUTE  # no row leaves more than one piece single
    beyond = pl.cdiv(dy.shape[1], c.tile_o)

    def kernel(x_ref, dy_ref, ptr_ref, column_ref, slot_ref, pair_ptr_ref, row_ref, values_ref, *scratch):
        xs, dys, out, loaded, freed = scratch
        pipeline = Pipeline(loaded, freed, c.stages)

        def place(item):
            """Block row and part of it, the first of two pieces, how many the row has, and the number of steps."""
            pair, part = divide(item, down)
            row = row_ref[pair]
            pieces = (ptr_ref[row + 1] - ptr_ref[row]) * across
            stored = pair < pair_ptr_ref[rows]
            return row, part, COMPUTE * (pair - pair_ptr_ref[row]), pieces, jnp.where(stored, steps, 0)

        def piece_of(row, piece):
            """The entry that a piece belongs to, and which part of its columns it is."""
            entry, part = divide(piece, across)
            return jnp.minimum(ptr_ref[row] + entry, nnzb - 1), part

        def load(item, done):
            row, part, first, pieces, steps = place(item)
            left = jax.lax.div(row * i, jnp.int32(c.tile_i)) + part
            columns = []
            for w in range(COMPUTE):
                entry, at = piece_of(row, first + w)
                # The second of a single piece is a window beyond the array: TMA fills in zeros.
                columns.append(jnp.where(first + w < pieces, column_ref[entry] * across + at, beyond))

            def step(s, done):
                stage, batch = pipeline.wait_until_free(done), pl.ds(s * c.tile_m, c.tile_m)
                reads = x_ref.at[batch, pl.ds(left * c.tile_i, c.tile_i)]
                plgpu.copy_gmem_to_smem(reads, xs.at[stage], loaded.at[stage])
                for w, column in enumerate(columns):
                    reads = dy_ref.at[batch, pl.ds(column * c.tile_o, c.tile_o)]
                    plgpu.copy_gmem_to_smem(reads, dys.at[stage, w], loaded.at[stage])
                return done + 1

            return jax.lax.fori_loop(0, steps, step, done)

        def multiply(item, done):
            row, part, first, pieces, steps = place(item)
            mine = jax.lax.axis_index("wg")

            def multiply_rows(acc, stage):
                plgpu.wgmma(acc, xs.at[stage].transpose((1, 0)), dys.at[stage, mine])

            total = pipeline.sum((c.tile_i, c.tile_o), multiply_rows, steps, done, in_flight=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
            out[mine] = total.astype(x.dtype)
            plgpu.commit_smem()
            entry, at = piece_of(row, first + mine)
            columns = pl.ds(at * c.tile_o, c.tile_o)
            wanted = jnp.logical_and(first + mine < pieces, steps > 0)

            def store(source, row):
                target = values_ref.at[slot_ref[entry], pl.ds(row, min(i, c.tile_i)), columns]
                plgpu.copy_smem_to_gmem(source, target)

            if i >= c.tile_i:
                pl.when(wanted)(lambda: store(out.at[mine], part * c.tile_i))
            else:  # the tile holds several block rows: keep this one
                which = jax.lax.rem(row, jnp.int32(c.tile_i // i))
                for k in range(c.tile_i // i):
                    here = jnp.logical_and(wanted, which == k)
                    pl.when(here)(lambda k=k: store(out.at[mine, pl.ds(k * i, i)], 0))
            return done + steps

        specialise(pairs * down, pipeline.drain, load, multiply)

    scratch = (
        plgpu.SMEM((c.stages, c.tile_m, c.tile_i), x.dtype),
        plgpu.SMEM((c.stages, COMPUTE, c.tile_m, c.tile_o), x.dtype),
        plgpu.SMEM((COMPUTE, c.tile_i, c.tile_o), x.dtype),
        *barriers(c.stages, 1 + COMPUTE),
    )
    per_row = pl.cdiv(jnp.diff(index.row_ptr) * across, COMPUTE)
    pair_ptr = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_row, dtype=jnp.int32)])
    row_of = jnp.searchsorted(pair_ptr[1:], jnp.arange(pairs, dtype=jnp.int32), side="right")
    row_of = jnp.minimum(row_of, rows - 1).astype(jnp.int32)
    values = jax.ShapeDtypeStruct((nnzb, i, o), x.dtype)
    run = launch(kernel, values, scratch, "sample", programs=device.multiprocessors, cluster=1, approximate=False)
    return run(x, dy, index.row_ptr, index.col_index, index.order, pair_ptr, row_of)
