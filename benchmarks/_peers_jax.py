"""Contenders that run in JAX: ours on the back end it picks and on XLA, dense, masked, BCOO, BCSR, einsum, vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse as jsparse

from benchmarks._problems import RATE, Cell, Problem
from jaxsparse import block_diag_matmul, spmm

Run = Callable[[], Any]  # one call, waited for; returns y
MOST_TEMPORARIES = 2**31
OPTIMIZERS = {"sgd": optax.sgd(RATE), "adam": optax.adam(RATE)}


def builders(cell: Cell, problem: Problem) -> dict[str, Callable[[], Run]]:
    """By name, what compiles a contender; it raises where the contender can't do the cell."""
    make = functools.partial(_build, _Shared(cell, problem))
    if cell.num_blocks:
        return _block_diagonal(make, problem)
    return _sparse(make, cell, problem)


def first_call(cell: Cell, problem: Problem) -> dict[str, Run]:
    """By name, what traces, lowers and compiles from nothing."""
    shared, ours = _Shared(cell, problem), _ours_diagonal if cell.num_blocks else _ours
    compiled = functools.partial(functools.partial, _compile, shared)
    return {
        "ours": compiled("values", _values, ours(None)),
        "ours (xla)": compiled("values", _values, ours("xla")),
        "JAX dense": compiled("dense", _dense_weight, _dense),
    }


def _sparse(make, cell, problem):
    everyone = {
        "ours": lambda: make("values", _values, _ours(None)),
        "ours (xla)": lambda: make("values", _values, _ours("xla")),
        "JAX dense": lambda: make("dense", _dense_weight, _dense),
        "JAX masked": lambda: make("dense", _masked_weight, _masked),
    }
    if cell.family == "blocks" and cell.mode == "forward":
        return everyone
    if cell.family == "blocks":
        product = functools.partial(_build, _Shared(cell, problem, mode="forward"))
        return everyone | {"JAX dense product": lambda: product("dense", _dense_weight, _dense)}
    return everyone | {
        "JAX BCOO": lambda: make("values", _coordinates, _bcoo(cell.shape), bounded=True),
        "JAX BCSR": lambda: make("by row", _compressed, _bcsr, bounded=True),
    }


def _block_diagonal(make, problem):
    return {
        "ours": lambda: make("values", _values, _ours_diagonal(None)),
        "ours (xla)": lambda: make("values", _values, _ours_diagonal("xla")),
        "JAX einsum": lambda: make("values", _values, _einsum),
        "JAX vmap": lambda: make("values", _values, _vmap),
        "JAX dense": lambda: make("dense", _dense_weight, _dense),
        "JAX masked": lambda: make("dense", _masked_weight, _masked),
    }


# ---- one call ---------------------------------------------------------------------------------------


class _Shared:
    """What the contenders of a cell share: x and dy, and the weights of those that store them alike."""

    def __init__(self, cell: Cell, problem: Problem, mode: str = ""):
        self.problem, self.mode = problem, mode or cell.mode
        self.optimizer = OPTIMIZERS[cell.optimizer]
        self.x, self.dy = jnp.array(problem.x), jnp.array(problem.dy)
        self.states: dict[str, list] = {}

    def state(self, layout: str, weight: np.ndarray) -> list:
        """[weight, optimizer state], to be replaced by what a step returns."""
        if layout not in self.states:
            w = jnp.array(weight)
            self.states[layout] = [w, self.optimizer.init(w) if self.mode == "training" else None]
        return self.states[layout]


def _build(shared: _Shared, layout: str, weights, apply, bounded: bool = False) -> Run:
    weight, fixed = weights(shared.problem)
    state, x, dy = shared.state(layout, weight), shared.x, shared.dy
    training = shared.mode == "training"
    run = jax.jit(_program(shared, apply), donate_argnums=(0,) if training else ())
    if bounded:
        _check_temporaries(run.lower(state, x, dy, fixed).compile())

    def step():
        state[:], y, _ = run(list(state), x, dy, fixed)
        return y.block_until_ready()  # all results of one program are ready at once

    return step if training else lambda: run(state, x, dy, fixed).block_until_ready()


def _compile(shared: _Shared, layout: str, weights, apply):
    weight, fixed = weights(shared.problem)
    state = shared.state(layout, weight)
    return jax.jit(_program(shared, apply)).lower(state, shared.x, shared.dy, fixed).compile()


def _program(shared: _Shared, apply):
    """(state, x, dy, fixed) to y, or to (state, y, dx): all are results, so that XLA leaves no product out."""

    def forward(state, x, dy, fixed):
        return apply(state[0], x, fixed)

    def training(state, x, dy, fixed):
        w, moments = state
        y, pull_back = jax.vjp(lambda w, x: apply(w, x, fixed), w, x)
        dw, dx = pull_back(dy)
        updates, moments = shared.optimizer.update(dw, moments, w)
        return [optax.apply_updates(w, updates), moments], y, dx

    return training if shared.mode == "training" else forward


def _check_temporaries(compiled) -> None:
    size = compiled.memory_analysis().temp_size_in_bytes
    if size > MOST_TEMPORARIES:
        raise MemoryError(f"{size / 2**30:.1f} GiB of temporaries")


# ---- weights: (what is trained, what is fixed) of a problem ----------------------------------------------


def _values(p: Problem):
    return p.values, p.pattern


def _dense_weight(p: Problem):
    return p.dense, None


def _masked_weight(p: Problem):
    return p.dense, jnp.array(p.mask)


def _coordinates(p: Problem):
    return p.values, p.pattern.to_bcoo(jnp.asarray(p.values)).indices


def _compressed(p: Problem):
    # CSR of W^T, whose product with x^T is the one that XLA has for BCSR.
    by_row = p.pattern.T.to_bcsr(jnp.asarray(p.values))
    return np.asarray(by_row.data), (by_row.indices, by_row.indptr)


# ---- layers: (w, x, fixed) to y ---------------------------------------------------------------------------


def _ours(backend: str | None):
    return lambda w, x, pattern: spmm(x, w, pattern, backend=backend)


def _ours_diagonal(backend: str | None):
    return lambda w, x, _: block_diag_matmul(x, w, backend=backend)


def _dense(w, x, _):
    return x @ w


def _masked(w, x, mask):
    return x @ (w * mask)


def _bcoo(shape: tuple[int, int]):
    return lambda w, x, indices: x @ jsparse.BCOO((w, indices), shape=shape)


def _bcsr(w, x, index):
    return (jsparse.BCSR((w, *index), shape=(index[1].shape[0] - 1, x.shape[1])) @ x.T).T


def _einsum(w, x, _):
    return jnp.einsum("bmi,mio->bmo", x.reshape(x.shape[0], *w.shape[:2]), w).reshape(x.shape[0], -1)


def _vmap(w, x, _):
    y = jax.vmap(jnp.matmul, (1, 0), 1)(x.reshape(x.shape[0], *w.shape[:2]), w)
    return y.reshape(x.shape[0], -1)
