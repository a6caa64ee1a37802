"""The forward product and the input gradient of small blocks: several lines of y walk the union of their sources.

A program holds a tile of y that is `lines` lines wide. It walks the sources that any of them reads, loads each tile of
x once, and multiplies it by the blocks of those lines that store one there. Programs walk alike in clusters. Those
side by side along the batch share what they load of the blocks. Of two along the lines, each loads half of every tile
of x that both need, and both get it; they walk the sources that any of their lines reads, and where only one of them
needs x, it loads it alone. One warpgroup loads; two multiply the same tile of x, each by the blocks of its half of the
lines, which come in a stream of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._device import Device
from pallas_kernels._epilogue import ACTIVATIONS
from pallas_kernels._lines import Lines
from pallas_kernels.mosaic._pipeline import COMPUTE, Pipeline, barriers, divide, launch, specialise
from pallas_kernels.mosaic.configs import Union


class Walk(NamedTuple):
    """The sources that groups of neighbouring lines read, and the blocks that meet them there.

    A group is what a cluster holds at once.

    Attributes:
      steps: [groups], how many sources a group reads.
      source: [groups * sources], those first that are read, in rising order.
      mask: [groups * sources], with a bit for each line that stores a block there.
      slot: [groups * sources * lines], where the block of each line lies, or nnzb where there is none.
      longest: [groups], those that take long first.
    """

    steps: jax.Array
    source: jax.Array
    mask: jax.Array
    slot: jax.Array
    longest: jax.Array


def walk(lines: Lines, sources: int, together: int) -> Walk:
    """The walk of groups of so many lines; the last group may have lines that store nothing."""
    count, nnzb = lines.ptr.shape[0] - 1, lines.source.shape[0]
    groups = pl.cdiv(count, together)
    line = jnp.searchsorted(lines.ptr[1:], jnp.arange(nnzb, dtype=jnp.int32), side="right", method="scan_unrolled")
    group, member = divide(line.astype(jnp.int32), together)
    table = jnp.full((groups, sources, together), nnzb, jnp.int32)
    table = table.at[group, lines.source, member].set(lines.slot, unique_indices=True, mode="promise_in_bounds")
    read = (table < nnzb).any(2)
    steps = read.sum(1, dtype=jnp.int32)
    at = jnp.where(read, jnp.cumsum(read, 1, dtype=jnp.int32) - 1, sources)
    rank = jnp.broadcast_to(jnp.arange(sources, dtype=jnp.int32), read.shape)
    source = jnp.zeros_like(rank).at[jnp.arange(groups)[:, None], at].set(rank, mode="drop")
    slot = jnp.take_along_axis(table, source[:, :, None], 1)
    mask = (jnp.where(slot < nnzb, 1, 0) << jnp.arange(together, dtype=jnp.int32)).sum(2, dtype=jnp.int32)
    return Walk(steps, source.ravel(), mask.ravel(), slot.ravel(), jnp.argsort(-steps).astype(jnp.int32))


def union(x, blocks, lines: Lines, bias, config: Union, device: Device, *, transposed: bool, activation: str | None):
    """The product of `gather.gather`, with the same arguments and result."""
    m, nnzb, c = x.shape[0], blocks.shape[0], config
    inner, width = blocks.shape[:0:-1] if transposed else blocks.shape[1:]
    count, parts, depth = lines.ptr.shape[0] - 1, width // c.tile_n, inner // c.tile_k
    sources, together, own = x.shape[1] // inner, c.lines * c.sharing, c.columns // COMPUTE
    groups, tiles = pl.cdiv(count, together), pl.cdiv(m, c.tile_m * c.cluster)
    bands = pl.cdiv(tiles, c.band)
    band = pl.cdiv(tiles, bands)
    window = (c.tile_n, c.tile_k) if transposed else (c.tile_k, c.tile_n)

    def kernel(x_ref, w_ref, steps_ref, source_ref, mask_ref, slot_ref, longest_ref, *rest):
        *bias_ref, y_ref, xs, ws, ys, x_loaded, x_freed, w_loaded, w_freed = rest
        of_x = Pipeline(x_loaded, x_freed, c.stages)
        cluster = jax.lax.axis_index("cluster") if c.cluster > 1 else 0
        first = jax.lax.axis_index("sharing") * c.lines if c.sharing > 1 else 0  # of the group's lines

        def mine_of(mask):
            """The bits of this program's lines."""
            return jax.lax.shift_right_logical(mask, first) & (2**c.lines - 1)

        def of_w(warpgroup):
            return Pipeline(w_loaded, w_freed, c.w_stages, warpgroup * c.w_stages)

        def place(item):
            """Where the item's rows begin, its group and number of steps."""
            item, tile = divide(item, band)
            block, rank = divide(item, groups)
            group, tile = longest_ref[rank], block * band + tile
            return (tile * c.cluster + cluster) * c.tile_m, group, jnp.where(tile < tiles, steps_ref[group], 0)

        def walked(group, step):
            """Which of the group's sources a step is about, read ahead of it: so never beyond the last."""
            return group * sources + jnp.minimum(jax.lax.div(step, jnp.int32(depth)), sources - 1)

        def load(item, done):
            row, group, steps = place(item)

            def read(step):
                at = walked(group, step)
                slots = tuple(slot_ref[at * together + first + line] for line in range(c.lines))
                return source_ref[at], mask_ref[at], slots

            def load_x(source, k, mask, stage):
                def copy(shared=None):
                    reads = x_ref.at[pl.ds(row, c.tile_m), pl.ds(source * inner + k, c.tile_k)]
                    plgpu.copy_gmem_to_smem(reads, xs.at[stage], x_loaded.at[stage], collective_axes=shared)

                if c.sharing == 1:
                    return copy()
                mine = mine_of(mask)
                alone = mask == mine << first
                pl.when((mine != 0) & ~alone)(lambda: copy("sharing"))
                pl.when((mine != 0) & alone)(copy)
                pl.when(mine == 0)(lambda: plgpu.barrier_arrive(x_loaded.at[stage]))  # so that both go on alike

            def step(s, carry):
                x_done, w_done, (source, mask, slots) = carry
                ahead = read(s + 1)
                k = jax.lax.rem(s, jnp.int32(depth)) * c.tile_k
                stage, w_done = of_x.wait_until_free(x_done), list(w_done)
                load_x(source, k, mask, stage)
                for column in range(c.lines * parts):
                    w, slot = column // own, slots[column // parts]
                    across = pl.ds(column % parts * c.tile_n, c.tile_n)
                    along = pl.ds(k, c.tile_k)
                    values = (slot, across, along) if transposed else (slot, along, across)

                    @pl.when(slot < nnzb)
                    def _(w=w, values=values, done=w_done[w]):
                        stage = of_w(w).wait_until_free(done)
                        shared = "cluster" if c.cluster > 1 else None
                        to = ws.at[stage], w_loaded.at[stage]
                        plgpu.copy_gmem_to_smem(w_ref.at[values], *to, collective_axes=shared)

                    w_done[w] += jnp.where(slot < nnzb, 1, 0)
                return x_done + 1, tuple(w_done), ahead

            return jax.lax.fori_loop(0, steps * depth, step, (*done, read(0)))[:2]

        def multiply(item, done):
            row, group, steps = place(item)
            mine = jax.lax.axis_index("wg")

            def scoped(*accs):
                def step(s, carry):
                    x_done, w_done, mask = carry
                    ahead = mine_of(mask_ref[walked(group, s + 1)])
                    x_stage = of_x.wait_until_loaded(x_done)
                    stored = [
                        jax.lax.rem(jax.lax.shift_right_logical(mask, (mine * own + j) // parts), 2) for j in range(own)
                    ]

                    def products(x, done):
                        for acc, there in zip(accs, stored, strict=True):

                            @pl.when(there == 1)
                            def _(acc=acc, done=done):
                                stage = of_w(mine).wait_until_loaded(done)
                                w = ws.at[stage]
                                plgpu.wgmma(acc, x, w.transpose((1, 0)) if transposed else w)
                                plgpu.wgmma_wait(0)
                                of_w(mine).free(done)

                            done += there

                    def products_from_registers():
                        x = plgpu.load(xs.at[x_stage], layout=plgpu.Layout.WGMMA)  # pyright: ignore[reportCallIssue]  as in 0.10
                        plgpu.commit_smem()  # that it was read comes before whatever TMA writes there
                        products(x, w_done)

                    if c.registers:
                        pl.when(sum(stored) > 0)(products_from_registers)
                    else:
                        products(xs.at[x_stage], w_done)
                    w_done += sum(stored)
                    of_x.free(x_done)
                    return x_done + 1, w_done, ahead

                mask = mine_of(mask_ref[walked(group, 0)])
                done_now = jax.lax.fori_loop(0, steps * depth, step, (*done, mask))[:2]
                return *done_now, *(acc[...] for acc in accs)

            accumulator = plgpu.WGMMAAccumulatorRef((c.tile_m, c.tile_n), jnp.float32)
            x_done, w_done, *totals = pl.run_scoped(scoped, *[accumulator] * own)
            for j, total in enumerate(totals):
                place_in_tile = mine * own + j
                column = ((group * together + first) * parts + place_in_tile) * c.tile_n
                if bias_ref:
                    reads, layout = bias_ref[0].at[pl.ds(column, c.tile_n)], plgpu.Layout.WGMMA.reduce(0)
                    added = plgpu.load(reads, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]  as in 0.10
                    total = total + jax.lax.broadcast_in_dim(added.astype(jnp.float32), total.shape, (1,))
                tile = ys.at[mine]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
                tile[...] = ACTIVATIONS[activation](total).astype(x.dtype)
                plgpu.commit_smem()
                target = y_ref.at[pl.ds(row, c.tile_m), pl.ds(column, c.tile_n)]
                # a program may have room for more lines than it holds, and the last group for more than there are
                there = (place_in_tile < c.lines * parts) & (column < count * width)
                pl.when(there)(lambda tile=tile, to=target: plgpu.copy_smem_to_gmem(tile, to))
            return x_done, w_done

        def drain(done):
            of_x.drain(done[0])
            for w in range(COMPUTE):
                of_w(w).drain(done[1][w])

        begin = ((0, (0,) * COMPUTE), (0, 0))
        specialise(bands * groups * band, drain, load, multiply, begin)

    scratch = (
        plgpu.SMEM((c.stages, c.tile_m, c.tile_k), x.dtype),
        plgpu.SMEM((COMPUTE * c.w_stages, *window), x.dtype),
        plgpu.SMEM((COMPUTE, c.tile_m, c.tile_n), x.dtype),
        *barriers(c.stages, 1, c.sharing, axis="sharing"),
        *barriers(COMPUTE * c.w_stages, 1, c.cluster, readers=1),
    )
    operands = (x, blocks, *walk(lines, sources, together))
    if bias is not None:
        operands += (jnp.pad(bias, (0, (groups * together * parts + c.columns) * c.tile_n - bias.shape[0])),)
    y = jax.ShapeDtypeStruct((m, count * width), x.dtype)
    coarse = x.dtype == jnp.bfloat16  # whose rounding hides that of the hardware's tanh
    how = {"programs": device.multiprocessors, "cluster": c.cluster, "sharing": c.sharing, "approximate": coarse}
    return launch(kernel, y, scratch, "gather_union", **how)(*operands)
