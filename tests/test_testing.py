"""The comparison helper passes what is right and can fail: on a zeroed, a swapped and a transposed block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import reference, testing
from jaxsparse.formats import BlockPattern

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
PATTERN = BlockPattern.from_mask(np.kron(np.eye(4) + np.eye(4, k=1), np.ones((16, 16))), 16)
CASE = testing.Case("planted", lambda: PATTERN)


def spoil(blocks, how):
    if how == "zeroed block":
        return blocks.at[3].set(0)
    if how == "swapped blocks":
        return blocks.at[jnp.array([1, 2])].set(blocks[jnp.array([2, 1])])
    if how == "transposed block":
        return blocks.at[0].set(blocks[0].T)
    return blocks.at[5, 3, 2].set(jnp.nan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["by rows", "by columns"])
@pytest.mark.parametrize("case", [CASE, testing.CASES[3]], ids=lambda c: c.name)
def test_jaxs_dense_product_passes_however_the_weight_is_stored(case, stored, dtype):
    x, blocks, bias, dy = testing.inputs(case, case.pattern, dtype)
    w = jnp.asarray(reference.densify(blocks, case.pattern).astype(dtype))
    if stored == "by rows":
        products = jax.jit(lambda x, w, dy: {"y": x @ w + bias, "dx": dy @ w.T})(x, w, dy)
    else:
        products = jax.jit(lambda x, wt, dy: {"y": x @ wt.T + bias, "dx": dy @ wt})(x, w.T, dy)
    truth, dense = (f(x, blocks, bias, dy, case.pattern) for f in (testing.true_products, testing.dense_products))
    for name, value in products.items():
        testing.assert_as_close_as_dense(value, truth[name], dense[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["zeroed block", "swapped blocks", "transposed block", "one NaN"])
def test_a_spoilt_weight_is_rejected_in_value_and_input_gradient(how, dtype):
    x, blocks, bias, dy = testing.inputs(CASE, PATTERN, dtype)
    truth, dense = (f(x, blocks, bias, dy, PATTERN) for f in (testing.true_products, testing.dense_products))
    wrong = testing.dense_products(x, spoil(blocks, how), bias, dy, PATTERN)
    for name in ("y", "dx"):
        with pytest.raises(AssertionError, match="off by"):
            testing.assert_as_close_as_dense(wrong[name], truth[name], dense[name], name)


@pytest.mark.parametrize("how", ["zeroed block", "swapped blocks", "transposed block", "one NaN"])
def test_a_spoilt_weight_gradient_is_rejected(how):
    given = testing.inputs(CASE, PATTERN, jnp.float32)
    truth, dense = testing.true_products(*given, PATTERN)["dW"], testing.dense_products(*given, PATTERN)["dW"]
    with pytest.raises(AssertionError, match="off by"):
        testing.assert_as_close_as_dense(spoil(dense, how), truth, dense, "dW")


def test_another_shape_or_dtype_is_rejected():
    y = jnp.ones((3, 4))
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_as_close_as_dense(y[:2], np.ones((3, 4)), y)
    with pytest.raises(AssertionError, match="bfloat16"):
        testing.assert_as_close_as_dense(y.astype(jnp.bfloat16), np.ones((3, 4)), y)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_second_rounding_is_seen(dtype):
    x, w = testing.normal(0, (30, 40), np.float64), testing.normal(1, (40, 50), np.float64)
    truth, sums = x @ w, (x.astype(np.float32) @ w.astype(np.float32)).astype(np.float32)
    testing.assert_rounded_once(jnp.asarray(sums, dtype), truth, sums)
    halves = jnp.asarray(x[:, :20] @ w[:20], dtype) + jnp.asarray(x[:, 20:] @ w[20:], dtype)
    testing.assert_as_close_as_dense(halves, truth, jnp.asarray(sums, dtype))
    for wrong, words in ((halves, "off by"), (halves * jnp.nan, "off by nan"), (halves[:2], "shape")):
        with pytest.raises(AssertionError, match=words):
            testing.assert_rounded_once(wrong, truth, sums)


def test_case_names_are_unique():
    names = [case.name for case in testing.CASES]
    assert len(set(names)) == len(names)
