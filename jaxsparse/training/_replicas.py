"""Arrays as a whole on every device of a mesh, so that all of them compute the same, and the same as one would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def on_whole(function: Callable[..., Any], *trees: Any) -> Any:
    """function(*trees) of whole arrays on every device, whatever share of them each one has; no gradient goes through.

    A sum that devices share is added in another order than on one device, and of nearly equal scores another may then
    be the highest. So what is chosen by scores is chosen here. Inside `jax.shard_map` every device has what it is
    given.
    """
    types = [jax.typeof(array) for array in jax.tree.leaves(trees)]
    mesh = next((t.sharding.mesh for t in types if _is_explicit(t.sharding)), None)
    if mesh is None:
        return function(*jax.tree.map(_by_partitioner, trees))
    replicated = PartitionSpec()
    local = jax.shard_map(function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
    return local(*jax.tree.map(unsharded, trees))


def unsharded(array: Any) -> Any:
    """An array in one piece where a mesh of explicit axes has cut it, for operations that JAX then leaves undefined."""
    sharding = jax.typeof(array).sharding
    if not _is_explicit(sharding):
        return array  # XLA's partitioner sees to it
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def laid_as(array: Any, other: Any) -> Any:
    """An array where `other`, of its shape, lies on a mesh of explicit axes; as it is on others."""
    sharding = jax.typeof(other).sharding
    return jax.sharding.reshard(array, sharding) if _is_explicit(sharding) else array


def _is_explicit(sharding: Any) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


# ---- for meshes of automatic axes: what only XLA's partitioner can tell ------------------------------------


def _by_partitioner(array):
    return _whole_p.bind(jax.lax.stop_gradient(array)) if jnp.ndim(array) else array  # PRNG keys have no dimension


def _lower(ctx, array):
    if (getattr(ctx.module_context.axis_context, "num_devices", 1) or 1) == 1:
        return [array]  # custom_partitioning would keep the program out of JAX's persistent cache
    return mlir.lower_fun(_gathered(ctx.avals_in[0].ndim), multiple_results=False)(ctx, array)


@functools.cache
def _gathered(ndim: int):
    """The identity, of an array that no device has only a share of."""
    function = custom_partitioning(_as_it_is)
    before, after = ([f"{side}{k}" for k in range(ndim)] for side in ("i", "o"))  # unlike: nothing spreads through
    function.def_partition(
        partition=_partition,
        sharding_rule=f"{' '.join(before)} -> {' '.join(after)}",
        need_replication_factors=(*before, *after),
    )
    return function


def _partition(mesh, operands, result):
    everywhere = NamedSharding(mesh, PartitionSpec())
    return mesh, _as_it_is, everywhere, (everywhere,)


def _as_it_is(array):
    return array


_whole_p = Primitive("on_every_device")
_whole_p.def_impl(_as_it_is)
_whole_p.def_abstract_eval(_as_it_is)
batching.primitive_batchers[_whole_p] = lambda operands, dims: (_whole_p.bind(*operands), dims[0])
mlir.register_lowering(_whole_p, _lower)
prim_requires_devices_during_lowering.add(_whole_p)
