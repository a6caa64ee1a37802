"""The forward product and the input gradient as one warp-specialised, persistent kernel for Hopper.

Each program of the grid stays on its multiprocessor and takes one item of work after another: a tile of y. One
warpgroup reads the pattern and keeps `stages` tiles of x and of the blocks on their way from memory, also those
of the next item; two warpgroups multiply, each its half of the rows, and finish and store y meanwhile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import Device
from pallas_kernels._epilogue import ACTIVATIONS
from pallas_kernels._lines import Lines
from pallas_kernels.mosaic._pipeline import COMPUTE, Pipeline, barriers, divide, launch, specialise
from pallas_kernels.mosaic.configs import Gather


def gather(x, blocks, lines: Lines, bias, config: Gather, device: Device, *, transposed: bool, activation: str | None):
    """y[:, line] = activation(sum over the entries e of the line  x[:, source[e]] @ blocks[slot[e]]  +  bias[line]).

    Args:
      x: [m, features] of whole blocks, m a multiple of 8; bfloat16 or float16.
      blocks: [nnzb, i, o], read as [o, i] if `transposed`.
      lines: the entries of every output block.
      bias: one number per output, or None.
      config: sizes of tiles, which must divide those of the block.
    Returns:
      [m, number of lines * width of a block] in the dtype of `x`.
    """
    m, nnzb, c = x.shape[0], blocks.shape[0], config
    inner, width = blocks.shape[:0:-1] if transposed else blocks.shape[1:]
    count, parts, depth, rows = lines.ptr.shape[0] - 1, width // c.tile_n, inner // c.tile_k, COMPUTE * c.tile_m
    tiles = pl.cdiv(m, rows * c.cluster)
    bands = pl.cdiv(tiles, c.band)
    band = pl.cdiv(tiles, bands)  # so many tiles of the batch share x in the cache while all lines pass by
    window = (c.tile_n, c.tile_k) if transposed else (c.tile_k, c.tile_n)

    def kernel(x_ref, w_ref, ptr_ref, source_ref, slot_ref, longest_ref, *rest):
        *bias_ref, y_ref, xs, ws, ys, loaded, freed = rest
        pipeline = Pipeline(loaded, freed, c.stages)
        cluster = jax.lax.axis_index("cluster") if c.cluster > 1 else 0

        def place(item):
            """Where the item's rows begin, which line and part of it, and its first entry and number of steps."""
            item, tile = divide(item, band)
            item, part = divide(item, parts)
            block, rank = divide(item, count)
            line, tile = longest_ref[rank], block * band + tile
            first, entries = ptr_ref[line], ptr_ref[line + 1] - ptr_ref[line]
            steps = pl.cdiv(entries, c.stack) * depth
            return (tile * c.cluster + cluster) * rows, line, part, first, jnp.where(tile < tiles, steps, 0)

        def load(item, done):
            row, line, part, first, steps = place(item)
            last = ptr_ref[line + 1] - 1

            def step(s, done):
                group, k = divide(s, depth)
                stage = pipeline.wait_until_free(done)
                for j in range(c.stack):
                    entry = first + group * c.stack + j
                    stored = jnp.minimum(entry, last)
                    # Entries past the end of the line are windows beyond the arrays: TMA fills in zeros.
                    source = jnp.where(entry > last, pl.cdiv(x.shape[1], inner), source_ref[stored])
                    slot = jnp.where(entry > last, nnzb, slot_ref[stored])
                    along, across = (pl.ds(k * c.tile_k, c.tile_k), pl.ds(part * c.tile_n, c.tile_n))
                    values = (slot, across, along) if transposed else (slot, along, across)
                    reads = pl.ds(row, rows), pl.ds(source * inner + k * c.tile_k, c.tile_k)
                    plgpu.copy_gmem_to_smem(x_ref.at[reads], xs.at[stage, j], loaded.at[stage])
                    shared = "cluster" if c.cluster > 1 else None
                    plgpu.copy_gmem_to_smem(w_ref.at[values], ws.at[stage, j], loaded.at[stage], collective_axes=shared)
                return done + 1

            return jax.lax.fori_loop(0, steps, step, done)

        def multiply(item, done):
            row, line, part, _, steps = place(item)
            mine = jax.lax.axis_index("wg") * c.tile_m

            def multiply_stack(acc, stage):
                for j in range(c.stack):
                    w = ws.at[stage, j]
                    plgpu.wgmma(acc, xs.at[stage, j, pl.ds(mine, c.tile_m)], w.transpose((1, 0)) if transposed else w)

            total = pipeline.sum((c.tile_m, c.tile_n), multiply_stack, steps, done, in_flight=c.stack)
            column = line * width + part * c.tile_n
            if bias_ref:
                source, layout = bias_ref[0].at[pl.ds(column, c.tile_n)], plgpu.Layout.WGMMA.reduce(0)
                added = plgpu.load(source, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]  as in 0.10
                total = total + jax.lax.broadcast_in_dim(added.astype(jnp.float32), total.shape, (1,))
            tile = ys.at[jax.lax.axis_index("wg")]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
            tile[...] = ACTIVATIONS[activation](total).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, y_ref.at[pl.ds(row + mine, c.tile_m), pl.ds(column, c.tile_n)])
            return done + steps

        specialise(bands * count * parts * band, pipeline.drain, load, multiply)

    scratch = (
        plgpu.SMEM((c.stages, c.stack, rows, c.tile_k), x.dtype),
        plgpu.SMEM((c.stages, c.stack, *window), x.dtype),
        plgpu.SMEM((COMPUTE, c.tile_m, c.tile_n), x.dtype),
        *barriers(c.stages, 2 * c.stack, c.cluster),
    )
    longest = jnp.argsort(-jnp.diff(lines.ptr)).astype(jnp.int32)  # lines that take long begin first
    operands = (x, blocks, *lines, longest) if bias is None else (x, blocks, *lines, longest, bias)
    y = jax.ShapeDtypeStruct((m, count * width), x.dtype)
    coarse = x.dtype == jnp.bfloat16  # whose rounding hides that of the hardware's tanh
    how = {"programs": device.multiprocessors, "cluster": c.cluster, "approximate": coarse}
    return launch(kernel, y, scratch, "gather", **how)(*operands)
