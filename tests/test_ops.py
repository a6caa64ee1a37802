"""Ops against the oracle, the allowed error set by the dense product; and what they refuse."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import mostly_slow

from jaxsparse import _backends, block_diag_matmul, reference, sddmm, spmm, testing
from jaxsparse.formats import BlockPattern

pytestmark = pytest.mark.usefixtures("strict")
CAN_RUN = {name: _backends.why_not(name, block=(16, 16)) for name in _backends.BACKENDS}
BACKENDS = [name for name, reason in CAN_RUN.items() if reason is None]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def skip_unless_it_runs(backend, pattern, dtype=jnp.float32):
    """Not every back end has kernels for every block and dtype, and the interpreter is slow."""
    reason = backend and _backends.why_not(backend, "spmm", dtype, pattern.block)
    if backend == "interpret" and math.prod(pattern.shape) > 20_000:
        reason = f"{pattern.shape} takes seconds to interpret"
    if reason:
        pytest.skip(f"{backend}: {reason}")


def sweep(cases):
    """(case, backend, dtype). By XLA half of the cases are bfloat16 and the others float16, beside float32; one case in
    eight is both, and is interpreted as both.

    The quick tests have each case twice: on the C++ kernels in one dtype, by turns, and on another back end in float32.
    """
    rows = []
    for k, case in enumerate(cases):
        for backend, dtype in itertools.product(BACKENDS, DTYPES):
            kept = backend == "cpu" or dtype == jnp.float32 or k % 8 == 1
            quick = dtype == (DTYPES[k % 3] if backend == "cpu" else jnp.float32)
            quick &= backend in ("cpu", ["xla", "interpret"][k % 2])
            if kept or (backend == "xla" and dtype == DTYPES[1 + k % 2]):
                rows.append(pytest.param(case, backend, dtype, marks=[pytest.mark.slow] * (not quick)))
    return rows


@pytest.mark.parametrize("name", [name for name in CAN_RUN if name not in BACKENDS])
def test_every_back_end_runs_here_or_says_why_not(name):
    assert CAN_RUN[name]
    pytest.skip(f"{name}: {CAN_RUN[name]}")


def label(value):
    """The name of a case or dtype in a test's id."""
    return getattr(value, "name", None) or getattr(value, "__name__", str(value))


def check(f, x, weight, bias, dy, pattern):
    """y, dx, dW and db of f against the oracle, as close as the dense product."""
    got = jax.jit(functools.partial(testing.value_and_gradients, f))(x, weight, bias, dy)
    truth = testing.true_products(x, weight, bias, dy, pattern)
    dense = testing.dense_products(x, weight, bias, dy, pattern)
    for name, true in truth.items():
        testing.assert_as_close_as_dense(got[name], true, dense[name], name)


@pytest.mark.parametrize("case,backend,dtype", sweep(testing.CASES), ids=label)
def test_spmm_and_its_gradients_match_the_dense_product(case, backend, dtype):
    pattern = case.pattern
    skip_unless_it_runs(backend, pattern, dtype)
    f = lambda x, w, b: spmm(x, w, pattern, b, backend=backend)  # noqa: E731
    check(f, *testing.inputs(case, pattern, dtype), pattern)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("case", mostly_slow(testing.CASES[::4]), ids=lambda c: c.name)
def test_the_transposed_view_multiplies_by_the_transpose(case, backend):
    pattern = case.pattern.T
    skip_unless_it_runs(backend, pattern)
    f = lambda x, w, b: spmm(x, w, pattern, b, backend=backend)  # noqa: E731
    check(f, *testing.inputs(case, pattern, jnp.float32), pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("batch", mostly_slow([(1,), (), (5,)]), ids=str)
def test_a_pattern_with_indices_of_16_bits(batch, dtype):
    """By the back end that is picked; test_pallas_triton.py has others."""
    wide = testing._holes((90, 130))()
    narrow = dataclasses.replace(wide, row_index=wide.row_index.astype(jnp.uint16))
    product = jax.jit(functools.partial(spmm, activation="gelu"))
    for pattern, same in ((narrow, wide), (narrow.T, wide.T)):
        given = testing.inputs(testing.Case("", lambda: wide, batch), same, dtype)
        check(lambda x, w, b, pattern=pattern: spmm(x, w, pattern, b), *given, same)
        x, w, bias, _ = given
        y, constant = product(x, w, pattern, bias), jax.jit(lambda x, w, b, p=pattern: product(x, w, p, b))
        np.testing.assert_array_equal(y, product(x, w, same, bias))
        np.testing.assert_array_equal(y, constant(x, w, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", mostly_slow(testing.CASES[1:10:2]), ids=lambda c: c.name)
def test_spmm_in_float64(case, backend, x64):
    pattern = case.pattern
    skip_unless_it_runs(backend, pattern, jnp.float64)
    check(lambda x, w, b: spmm(x, w, pattern, b, backend=backend), *testing.inputs(case, pattern, jnp.float64), pattern)


@pytest.mark.parametrize("case,backend,dtype", sweep(testing.BLOCK_DIAG_CASES), ids=label)
def test_block_diag_matmul_and_its_gradients_match_the_dense_product(case, backend, dtype):
    shape, batch = case
    n, i, o = shape
    pattern = BlockPattern.block_diagonal(n, (i, o))
    x, blocks, bias, dy = testing.inputs(testing.Case("", lambda: pattern, batch), pattern, dtype)
    blocks = blocks.reshape(shape)  # a (1, 1) pattern stores [nnz]
    f = lambda x, w, b: block_diag_matmul(x, w.reshape(shape), b, backend=backend)  # noqa: E731
    check(f, x, blocks.reshape(pattern.values_shape), bias, dy, pattern)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", mostly_slow(testing.CASES[1::3], 3), ids=lambda c: c.name)
def test_sddmm_is_the_sampled_product(case, backend):
    skip_unless_it_runs(backend, case.pattern)
    for pattern in (case.pattern, case.pattern.T):
        x, blocks, bias, dy = testing.inputs(case, pattern, jnp.float32)
        dense = testing.dense_products(x, blocks, bias, dy, pattern)["dW"]
        got = sddmm(x, dy, pattern, backend=backend)
        testing.assert_as_close_as_dense(got, reference.sddmm(x, dy, pattern), dense, "sddmm")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", jnp.tanh])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", mostly_slow(["banded", "tall blocks of 32x16", "wide unstructured"]))
def test_activations_and_their_gradients_match_dense(name, backend, activation):
    case = next(c for c in testing.CASES if c.name == name)
    pattern, act = case.pattern, getattr(jax.nn, activation) if isinstance(activation, str) else activation
    skip_unless_it_runs(backend, pattern)
    x, blocks, bias, dy = testing.inputs(case, pattern, jnp.float32)
    got = testing.value_and_gradients(
        lambda x, w, b: spmm(x, w, pattern, b, activation=activation, backend=backend), x, blocks, bias, dy
    )
    want = testing.value_and_gradients(lambda x, w, b: act(x @ pattern.to_dense(w) + b), x, blocks, bias, dy)
    for key in got:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=2e-5 * float(abs(want[key]).max()))
    n_blocks = testing.normal(1, (4, pattern.shape[0] // 4, 8), jnp.float32)
    n_bias, x = testing.normal(2, (32,), jnp.float32), x[:, : 4 * (pattern.shape[0] // 4)]
    y = block_diag_matmul(x, n_blocks, n_bias, activation=activation, backend=backend)
    np.testing.assert_allclose(y, act(reference.block_diag_matmul(x, n_blocks) + n_bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_beyond_the_edge_are_ignored_and_get_no_gradient(backend):
    pattern = BlockPattern.random(jax.random.key(0), (50, 33), density=1.0, block=(16, 8))
    clean = pattern.gather(testing.normal(0, (50, 33), jnp.float32))
    dirty = jnp.where(pattern.edge_mask(), clean, 99.0)
    for p in (pattern, pattern.T):
        x = testing.normal(1, (6, p.shape[0]), jnp.float32)
        np.testing.assert_array_equal(spmm(x, clean, p, backend=backend), spmm(x, dirty, p, backend=backend))
    x = testing.normal(1, (6, 33), jnp.float32)
    grad = jax.grad(lambda w: (spmm(x, w, pattern.T, backend=backend) ** 2).sum())(clean)
    assert not np.asarray(grad)[~np.asarray(pattern.edge_mask())].any()


def test_one_block_is_a_dense_product():
    x, w = testing.normal(0, (5, 24), jnp.float32), testing.normal(1, (24, 16), jnp.float32)
    np.testing.assert_allclose(block_diag_matmul(x, w[None]), x @ w, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(dtype):
    case = testing.CASES[6]
    x, w, b, dy = testing.inputs(case, case.pattern, dtype)
    f = jax.jit(lambda: testing.value_and_gradients(lambda x, w, b: spmm(x, w, case.pattern, b), x, w, b, dy))
    first = f()
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, f(), first)


# ---- what is refused ------------------------------------------------------------------------------

P = BlockPattern.random(jax.random.key(0), (48, 32), density=0.5, block=16)
X, W, B = (jnp.ones(shape) for shape in ((4, 48), P.values_shape, (32,)))
REFUSED = {
    "wrong features": (lambda: spmm(X[:, :40], W, P), r"\(4, 40\) must have 48 features"),
    "a scalar": (lambda: spmm(jnp.float32(1), W, P), "48 features"),
    "wrong values": (lambda: spmm(X, W[:2], P), r"\(2, 16, 16\), but the pattern stores \(3, 16, 16\)"),
    "wrong bias": (lambda: spmm(X, W, P, B[:30]), r"bias of shape \(30,\) must be \(32,\)"),
    "mixed dtypes": (lambda: spmm(X.astype(jnp.bfloat16), W, P), "x is bfloat16 and blocks float32"),
    "mixed bias": (lambda: spmm(X, W, P, B.astype(jnp.float16)), "x is float32 and bias float16"),
    "integers": (lambda: spmm(X.astype(int), W.astype(int), P), "int32, but the products are defined for"),
    "complex": (lambda: spmm(X.astype(complex), W.astype(complex), P), "complex64, but the products"),
    "no pattern": (lambda: spmm(X, W, np.ones((48, 32))), "ndarray, not a BlockPattern.*from_mask"),
    "unknown back end": (lambda: spmm(X, W, P, backend="tpu"), "unknown backend 'tpu'.*'xla'"),
    "unknown activation": (lambda: spmm(X, W, P, activation="swish"), "unknown activation 'swish'.*'silu'"),
    "a stack of patterns": (lambda: spmm(X, W, jax.tree.map(lambda a: a[None], P)), "1 leading axes"),
    "sddmm features": (lambda: sddmm(X, X, P), r"dy of shape \(4, 48\) must have 32 features"),
    "sddmm batch": (lambda: sddmm(X, jnp.ones((5, 32)), P), "share their leading dimensions"),
    "sddmm dtypes": (lambda: sddmm(X, jnp.ones((4, 32), jnp.float16), P), "dy float16"),
    "block-diagonal features": (lambda: block_diag_matmul(X, jnp.ones((4, 10, 8))), "4 x 10 = 40"),
    "flat blocks": (lambda: block_diag_matmul(X, jnp.ones((48, 8))), r"\[num_blocks, i, o\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_raises_with_the_numbers(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrong", [[1.0, 2.0, 3.0, 4.0], (1.0,), 1.0, "x"], ids=["list", "tuple", "number", "string"])
def test_what_is_no_array_is_refused_by_name_as_jnp_dot_does(wrong):
    pattern = BlockPattern.random(jax.random.key(0), (4, 4), density=0.5)
    x, values, blocks = jnp.ones((3, 4)), jnp.ones(pattern.values_shape), jnp.ones((2, 2, 2))
    calls = {
        "spmm.* for x": lambda: spmm(wrong, values, pattern),
        "spmm.* for blocks": lambda: spmm(x, wrong, pattern),
        "spmm.* for bias": lambda: spmm(x, values, pattern, wrong),
        "sddmm.* for x": lambda: sddmm(wrong, x, pattern),
        "sddmm.* for dy": lambda: sddmm(x, wrong, pattern),
        "block_diag_matmul.* for x": lambda: block_diag_matmul(wrong, blocks),
        "block_diag_matmul.* for blocks": lambda: block_diag_matmul(x, wrong),
        "block_diag_matmul.* for bias": lambda: block_diag_matmul(x, blocks, wrong),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=f"{message}. Make it one, as by jax.numpy.asarray"):
            call()
    if isinstance(wrong, list):
        with pytest.raises(TypeError, match="requires"):
            jnp.dot(wrong, blocks)
