"""Races of Flax layers, dense against sparse: forward and backward pass, under `jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxsparse.costs.racing import Race, Races
from jaxsparse.models.rules import Rule


def race(races: Races, rule: Rule, dense: nnx.Linear, sparse: nnx.Module) -> Race:
    """The race of a layer against what a rule makes of it; one of equal sizes, dtypes and options is not run again."""
    dtype = dense.dtype or dense.param_dtype

    def steps():
        x = jax.random.normal(jax.random.key(0), (races.batch, dense.in_features), dtype)
        return [_step(layer, x) for layer in (dense, sparse)]

    kernel = dense.kernel[...]
    return races((kernel.shape, kernel.dtype, dtype, dense.use_bias, dense.precision, rule.describe()), steps)


def _step(layer: nnx.Module, x: jax.Array) -> Callable[[], Any]:
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    loss = lambda params, x, rest: nnx.merge(graph, params, rest)(x).sum()  # noqa: E731
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(grad(params, x, rest))
