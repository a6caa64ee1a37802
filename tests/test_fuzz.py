"""Random patterns, shapes and dtypes against the oracle, on every back end that runs here.

JAXSPARSE_FUZZ_EXAMPLES=100000 runs it for longer, and `make test-all` with 600.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsparse import BlockPattern, _backends, spmm, testing

EXAMPLES = int(os.environ.get("JAXSPARSE_FUZZ_EXAMPLES", "100"))
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# (in, out), block, batch: few, so that most examples meet a program that is already compiled
SIZES = [
    ((1, 1), 1, 1),
    ((37, 53), 1, 17),
    ((130, 70), 1, 65),
    ((64, 72), 8, 19),
    ((50, 33), (7, 5), 3),
    ((33, 70), (16, 32), 70),
    ((96, 40), (4, 40), 2),
]
COUNTS = [0.0, 0.1, 0.6, 1.0]
FEWER = {"cpu": 1, "xla": 30, "interpret": 60}  # of those that take any block, by how slow they are to compile
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] * (k > 0))
    for k, name in enumerate(name for name in FEWER if _backends.why_not(name) is None)
]


@st.composite
def problems(draw):
    shape, block, batch = draw(st.sampled_from(SIZES))
    seed, density = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(COUNTS))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0]))  # how unevenly rows and columns are filled
    return shape, block, batch, seed, density, skew, draw(st.sampled_from(DTYPES))


def draw_pattern(rng, shape, block, density, skew) -> BlockPattern:
    i, o = (block, block) if isinstance(block, int) else block
    grid = (-(-shape[0] // i), -(-shape[1] // o))
    weight = np.outer(rng.random(grid[0]) ** skew, rng.random(grid[1]) ** skew) + 1e-9
    count = round(density * weight.size)
    chosen = rng.choice(weight.size, count, replace=False, p=(weight / weight.sum()).ravel())
    mask = np.zeros(weight.size, bool)
    mask[chosen] = True
    cols, rows = np.nonzero(mask.reshape(grid).T)
    return BlockPattern.from_indices(rows, cols, shape=shape, block=block)


@functools.partial(jax.jit, static_argnums=0)
def run(backend, x, w, b, dy, pattern):
    return testing.value_and_gradients(lambda x, w, b: spmm(x, w, pattern, b, backend=backend), x, w, b, dy)


def dense_products(x, w, b, dy, pattern):
    """In float32 with one rounding at the end, by NumPy, so that nothing is compiled."""
    wide = [np.asarray(a, np.float32) for a in (x, w, b, dy)]
    x32, _, b32, dy32 = wide
    full = testing.reference.densify(w, pattern).astype(np.float32)
    products = {"y": x32 @ full + b32, "dx": dy32 @ full.T, "dW": testing.reference.sddmm(x32, dy32, pattern)}
    return {k: v.astype(x.dtype) for k, v in {**products, "db": dy32.sum(0)}.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_pattern_matches_the_oracle(backend):
    examples, checks = EXAMPLES // FEWER[backend], list(HealthCheck)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(problems())
    def check(problem):
        shape, block, batch, seed, density, skew, dtype = problem
        rng = np.random.default_rng(seed)
        pattern = draw_pattern(rng, shape, block, density, skew)
        x, w, b, dy = testing.inputs(testing.Case("", lambda: pattern, (batch,)), pattern, dtype)
        got = run(backend, x, w, b, dy, pattern)
        truth = testing.true_products(x, w, b, dy, pattern)
        dense = dense_products(x, w, b, dy, pattern)
        for name, true in truth.items():
            testing.assert_as_close_as_dense(np.asarray(got[name]), true, dense[name], name)

    check()
