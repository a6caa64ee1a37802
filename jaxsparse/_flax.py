"""What the Linen and the NNX layers share: initial values, their patterns, and how a pattern is serialized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._arguments import check_fits, check_one, refuse_empty
from jaxsparse._indices import Index
from jaxsparse.formats import PATTERNS, BlockPattern, NMPattern, Pattern, states

# ---- initial values ---------------------------------------------------------------------------------


def block_diag_values(key, init, shape: tuple[int, int, int], dtype) -> Any:
    """[n, i, o]: every block is drawn as a dense layer's (i, o) kernel of its own; in a box, if `init` gives one."""
    values, boxed = _kernels(key, init, *shape, dtype)
    return boxed(values)


def sparse_values(key, init, pattern: Pattern, dtype) -> Any:
    """Values of a pattern, as a dense layer of its mean fan-in and fan-out draws them; zero beyond the edge.

    An initializer reads its fans off the shape it is asked for. So whole kernels of the effective fans are
    drawn and dealt out, and every initializer keeps its meaning; at density 1 it is the dense kernel itself.
    What an initializer puts round a kernel, as `nn.with_partitioning` does, is put round the values: its axes are
    those of the values.
    """
    if pattern.density == 1:
        kernel, boxed = _unboxed(init(key, pattern.shape, dtype))
        return boxed(pattern.gather(kernel))
    size = math.prod(pattern.values_shape)
    kernels = -(-size // (pattern.fan_in * pattern.fan_out))
    values, boxed = _kernels(key, init, kernels, pattern.fan_in, pattern.fan_out, dtype)
    values = values.reshape(-1)[:size].reshape(pattern.values_shape)
    inside = pattern.edge_mask()
    return boxed(values if inside is None else jnp.where(inside, values, 0))


def _kernels(key, init, n: int, fan_in: int, fan_out: int, dtype) -> tuple[jax.Array, Callable]:
    """[n, fan_in, fan_out], and the function that puts other values where `init` put these."""
    if n == 1:  # the very numbers that a dense layer draws from this key
        kernel, boxed = _unboxed(init(key, (fan_in, fan_out), dtype))
        return kernel[None], boxed
    boxes = []

    def draw(key):
        kernel, boxed = _unboxed(init(key, (fan_in, fan_out), dtype))
        boxes.append(boxed)
        return kernel

    return jax.vmap(draw)(jax.random.split(key, n)), boxes[0]


def _unboxed(made: Any) -> tuple[jax.Array, Callable[[Any], Any]]:
    """The array in what an initializer made, and the function that makes the same of another array.

    Flax's boxes are pytrees of one leaf, whose `unbox` would already hold this array to the sharding that is meant for
    the whole kernel. NNX's metadata is none, and holds the array as `raw_value`.
    """
    if type(made).__name__ == "VariableMetadata":  # nothing here imports NNX, which Linen's users do without
        value, inner = _unboxed(made.raw_value)
        return value, lambda new: dataclasses.replace(made, raw_value=inner(new))
    (value,), tree = jax.tree.flatten(made)
    return value, lambda new: tree.unflatten([new])


# ---- patterns ---------------------------------------------------------------------------------------


def make_pattern(make_key: Callable[[], jax.Array], shape: tuple[int, int], density, block, pattern, mask) -> Pattern:
    """The pattern of an (in, out) matrix that exactly one of `density`, `pattern` and `mask` asks for."""
    name = check_one(density, pattern, mask)
    if name == "density":
        refuse_empty(density, shape)
        return BlockPattern.random(make_key(), shape, density=density, block=block)
    pattern = pattern if name == "pattern" else BlockPattern.from_mask(mask, block)
    check_fits(pattern, shape, name, PATTERNS)
    return pattern


def pattern_key(seed: int, place: int | jax.Array) -> jax.Array:
    """The key of a random pattern: it depends on a seed and on the layer's place in the model, and on nothing else.

    So two models of one code have one pattern, whatever key their values were drawn from, and parameters that were
    saved alone come back to the places they were trained at. The generator is named: JAX's default may be another.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), place)


# ---- flax.serialization -------------------------------------------------------------------------------


def _sizes(pattern: BlockPattern) -> dict[str, list[int]]:
    arrays = {name: list(getattr(pattern, name).shape) for name in Index._fields}
    return {"shape": list(pattern.shape), "block": list(pattern.block), "transposed": [pattern.transposed], **arrays}


def _to_state_dict(pattern: BlockPattern) -> dict:
    sizes = {name: np.asarray(size, np.int32) for name, size in _sizes(pattern).items() if name not in Index._fields}
    return {**pattern.index._asdict(), **sizes}


def _from_state_dict(target: BlockPattern, state: dict) -> BlockPattern:
    if all(state.get(name) is getattr(target, name) for name in Index._fields):
        return target  # so does Flax rebuild the attributes of a module, traced ones too
    pattern = BlockPattern.from_state(state)
    found, wanted = _sizes(pattern), _sizes(target)
    for name, size in wanted.items():
        if found[name] != size:
            raise ValueError(
                f"the saved pattern has {name} {found[name]}, but the model's {target} has {size}: they don't fit."
            )
    return pattern


def _n_m_to_state_dict(pattern: NMPattern) -> dict:
    sizes = ((name, getattr(pattern, name)) for name in states.N_M_NAMES[1:])
    return {"bits": pattern.bits, **{name: np.asarray(size, np.int32) for name, size in sizes}}


def _n_m_from_state_dict(target: NMPattern, state: dict) -> NMPattern:
    if state.get("bits") is target.bits:
        return target
    if not states.is_n_m_state(state):
        raise ValueError(f"the model has {target}, and what was saved is no NMPattern: {sorted(state)}.")
    pattern = states.from_n_m_state(state)
    if jax.tree.structure(pattern) != jax.tree.structure(target) or pattern.stacked != target.stacked:
        raise ValueError(f"the saved {pattern} does not fit the model's {target}.")
    return pattern


flax.serialization.register_serialization_state(NMPattern, _n_m_to_state_dict, _n_m_from_state_dict, override=True)
flax.serialization.register_serialization_state(BlockPattern, _to_state_dict, _from_state_dict, override=True)
