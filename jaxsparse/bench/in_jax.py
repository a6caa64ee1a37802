"""Contenders in JAX: ours, dense, masked, BCOO, and einsum where the blocks are diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse as jsparse

from jaxsparse.bench.grid import Cell, Problem
from jaxsparse.ops import block_diag_matmul, spmm

RATE = 1e-3  # of plain gradient descent, which every contender's training step ends with
_MOST_TEMPORARIES = 2**31  # bytes


def builders(cell: Cell, problem: Problem) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes a call; the call waits, and returns y."""
    p = problem
    everyone = {
        "jaxsparse": lambda: _ours(cell, p),
        "JAX dense": lambda: _build(cell, p, p.dense, None, lambda w, x, _: x @ w),
        "JAX masked": lambda: _build(cell, p, p.dense, jnp.asarray(p.mask), lambda w, x, mask: x @ (w * mask)),
    }
    if cell.diagonal:
        everyone["JAX einsum"] = lambda: _build(cell, p, p.values.reshape(cell.values_shape), None, _einsum)
    if cell.block == 1:
        everyone["JAX BCOO"] = lambda: _build(cell, p, p.values, _coordinates(p), _bcoo(p.shape))
    return everyone


def _ours(cell: Cell, p: Problem) -> Callable[[], Any]:
    if cell.diagonal:
        return _build(cell, p, p.values.reshape(cell.values_shape), None, lambda w, x, _: block_diag_matmul(x, w))
    return _build(cell, p, p.values, p.pattern, lambda w, x, pattern: spmm(x, w, pattern))


def _einsum(w: jax.Array, x: jax.Array, _: None) -> jax.Array:
    n, i, _o = w.shape
    return jnp.einsum("bni,nio->bno", x.reshape(-1, n, i), w).reshape(len(x), -1)


def _coordinates(p: Problem) -> jax.Array:
    return p.pattern.to_bcoo(jnp.asarray(p.values)).indices


def _bcoo(shape: tuple[int, int]) -> Callable[..., jax.Array]:
    return lambda w, x, indices: x @ jsparse.BCOO((w, indices), shape=shape)


def _build(cell: Cell, problem: Problem, weight: Any, fixed: Any, apply: Callable[..., jax.Array]) -> Callable[[], Any]:
    x, dy = jnp.asarray(problem.x), jnp.asarray(problem.dy)
    w = [jnp.array(weight)]

    def train(w, x, dy, fixed):
        y, pull_back = jax.vjp(lambda w, x: apply(w, x, fixed), w, x)
        dw, dx = pull_back(dy)
        return w - jnp.asarray(RATE, w.dtype) * dw, y, dx  # dx is a result, so that XLA computes it

    function, operands = (train, (x, dy, fixed)) if cell.train else (apply, (x, fixed))
    compiled = jax.jit(function, donate_argnums=(0,) if cell.train else ()).lower(w[0], *operands).compile()
    size = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    if size > _MOST_TEMPORARIES:
        raise MemoryError(f"it needs {size / 2**30:.1f} GiB of temporaries")
    if not cell.train:
        return lambda: compiled(w[0], *operands).block_until_ready()

    def step():
        w[0], y, _ = compiled(w[0], *operands)
        return y.block_until_ready()  # all results of one program are ready at once

    return step
