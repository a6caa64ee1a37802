"""What all kernels are made of: warpgroups with one task each, and the stages of memory between them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import configs

COMPUTE = 2  # warpgroups that multiply; one more loads


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages that are loaded and freed in turn, from `first` on; step `done` uses stage first + done % stages."""

    loaded: Any
    freed: Any
    stages: int
    first: Any = 0

    def stage(self, done):
        return self.first + jax.lax.rem(done, jnp.int32(self.stages))

    def wait_until_free(self, done):
        """The stage of this step, once those who read it are done with what was in it."""
        stage = self.stage(done)
        pl.when(done >= self.stages)(lambda: plgpu.barrier_wait(self.freed.at[stage]))
        return stage

    def wait_until_loaded(self, done):
        """The stage of this step, once all its copies have arrived."""
        stage = self.stage(done)
        plgpu.barrier_wait(self.loaded.at[stage])
        return stage

    def free(self, done):
        """Says that this warpgroup has read the stage of this step."""
        plgpu.barrier_arrive(self.freed.at[self.stage(done)])

    def sum(self, shape: tuple[int, int], multiply: Callable, steps, done, *, in_flight: int):
        """The float32 sum of what `multiply(accumulator, stage)` issues in each step, `in_flight` products a step."""

        def scoped(acc):
            def step(s, done):
                multiply(acc, self.wait_until_loaded(done))
                plgpu.wgmma_wait(in_flight)  # the products of the step before are done: its stage is free
                pl.when(s > 0)(lambda: self.free(done - 1))
                return done + 1

            after = jax.lax.fori_loop(0, steps, step, done)
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: self.free(after - 1))
            return acc[...]

        return pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def drain(self, done):
        """Waits for the last stages: a program of a cluster must not end while others free what it loaded."""
        for k in range(self.stages):
            step = done - self.stages + k
            stage = self.stage(step)
            pl.when(step >= 0)(lambda stage=stage: plgpu.barrier_wait(self.freed.at[stage]))


def barriers(
    stages: int, copies: int, cluster: int = 1, readers: int = COMPUTE, axis: str = "cluster"
) -> tuple[Any, Any]:
    """The scratch of a pipeline whose stages are filled by so many copies and read by so many warpgroups, those of all
    programs along an axis of the cluster."""
    loaded = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    if cluster == 1:
        return loaded, plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return loaded, plgpu.ClusterBarrier(collective_axes=(axis,), num_arrivals=readers, num_barriers=stages)


def specialise(items: int, drain: Callable, load: Callable, multiply: Callable, begin: Any = (0, 0)) -> None:
    """Runs `load` on one warpgroup and `multiply` on the others, over this program's share of the items.

    Both take (item, steps done before it) and return the steps done after it, which `begin` has at the beginning, of
    one and of the others; `drain` takes what the last `load` returned.
    """

    def every_item(task, begin):
        loop = plgpu.nd_loop((items,), collective_axes="sm", init_carry=jax.tree.map(jnp.int32, begin))
        return loop(lambda info, carry: task(info.index[0], carry))

    @pl.when(jax.lax.axis_index("wg") == COMPUTE)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        drain(every_item(load, begin[0]))

    @pl.when(jax.lax.axis_index("wg") < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        every_item(multiply, begin[1])
        plgpu.wait_smem_to_gmem(0)


def launch(
    kernel: Callable,
    out: jax.ShapeDtypeStruct,
    scratch,
    name: str,
    *,
    programs: int,
    cluster: int = 1,
    sharing: int = 1,
    approximate: bool,
):
    """The kernel as a function of its operands, with a program on each multiprocessor, or as many clusters of them as
    surely run at once; the axes of a cluster are called "cluster" and "sharing", where they have more than one."""
    axes = {name: size for name, size in (("cluster", cluster), ("sharing", sharing)) if size > 1}
    clusters = {"cluster": tuple(axes.values()), "cluster_names": tuple(axes)} if axes else {}
    semantics = plgpu.LoweringSemantics.Warpgroup
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=(configs.clusters(programs, cluster * sharing),),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name=f"jaxsparse_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, approx_math=approximate),
        **clusters,
    )


def divide(a, b: int):
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))
