"""Products and their steps in JAX, as they are timed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import ops
from jaxsparse._sizes import grid_of
from jaxsparse.costs.layers import Layer
from jaxsparse.formats import BlockPattern


def threads() -> int:
    """How many threads XLA has: one for each of this process's cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wide(dtype: str) -> contextlib.AbstractContextManager:
    """In which the dtype exists."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def steps(layer: Layer, modes: tuple[str, ...]) -> list[Callable[[], Any]]:
    """What is timed of a layer with a random pattern, one function for each mode.

    Args:
      modes: of "forward"; "gradients", which is forward and backward pass; "step", with Adam after that.
    """
    product, pattern, sizes = _product(layer)
    x = jnp.full((layer.batch, layer.shape[0]), 0.5, layer.dtype)
    w = jnp.full(sizes, 1e-3, layer.dtype)
    return [_MODES[mode](product, w, x, pattern) for mode in modes]


def _product(layer: Layer) -> tuple[Callable, Any, tuple[int, ...]]:
    """(function of weight, input and pattern; the pattern; the shape of the weight)."""
    if layer.kind == "dense":
        return lambda w, x, _: x @ w, None, layer.shape
    if layer.kind == "block_diag":
        return lambda w, x, _: ops.block_diag_matmul(x, w), None, (layer.stored, *layer.block)
    pattern = _pattern(layer)
    return lambda w, x, pattern: ops.spmm(x, w, pattern), pattern, pattern.values_shape


def _pattern(layer: Layer) -> BlockPattern:
    """Drawn on the host, as that compiles nothing."""
    rows, columns = grid_of(layer.shape, layer.block)
    places = np.random.default_rng(0).choice(rows * columns, layer.stored, replace=False, shuffle=False)
    places.sort()
    return BlockPattern.from_indices(places % rows, places // rows, shape=layer.shape, block=layer.block)


def _forward(product, w, x, pattern) -> Callable[[], Any]:
    call = jax.jit(product)
    return lambda: call(w, x, pattern).block_until_ready()


def _gradients(product, w, x, pattern) -> Callable[[], Any]:
    run, dy = jax.jit(lambda *args: _differentiated(product, *args)), _like_output(product, w, x, pattern)
    return lambda: jax.block_until_ready(run(w, x, pattern, dy))


def _step(product, w, x, pattern) -> Callable[[], Any]:
    adam = optax.adam(1e-6)
    state = [w + 0, adam.init(w)]

    dy = _like_output(product, w, x, pattern)

    def step(state, x, pattern, dy):
        w, moments = state
        y, dw, dx = _differentiated(product, w, x, pattern, dy)
        updates, moments = adam.update(dw, moments, w)
        return [optax.apply_updates(w, updates), moments], y, dx

    run = jax.jit(step, donate_argnums=0)

    def call():
        state[:], y, _ = run(list(state), x, pattern, dy)
        y.block_until_ready()  # all results of one program are ready at once

    return call


def _differentiated(product, w, x, pattern, dy):
    """All three products of a step: those are results, so that XLA leaves none out."""
    y, pull_back = jax.vjp(lambda w, x: product(w, x, pattern), w, x)
    return y, *pull_back(dy)


def _like_output(product, w, x, pattern) -> jax.Array:
    return jnp.full_like(jax.eval_shape(product, w, x, pattern), 0.5)


_MODES = {"forward": _forward, "gradients": _gradients, "step": _step}
