"""Patterns cut into pieces of one size: they make the whole product, padding makes nothing, and joining undoes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import mostly_slow

from jaxsparse import BlockPattern, spmm, testing
from jaxsparse._indices import check_index


def assert_same_pattern(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def product(parts, x, values):
    """x W from the pieces alone, as devices would compute it."""
    slices = parts.slices(x) if parts.axis == 0 else x

    def one(k, values, pattern):
        mine = jax.lax.dynamic_slice_in_dim(slices, k * parts.width, parts.width, -1) if parts.axis == 0 else x
        return parts.cut(spmm(parts.fit(mine), values, pattern, backend="xla"))

    y = jax.vmap(one)(jnp.arange(parts.count), values, parts.pattern)
    if parts.axis == 0:
        return y.sum(0)
    return jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], parts.count * parts.width)[..., : parts.shape[1]]


def padding_of(parts):
    """Which blocks of the pieces are padding."""
    filled = parts.split(jnp.ones((parts.nnzb, *parts.pattern.values_shape[1:])))
    return filled == 0


@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", mostly_slow(testing.CASES, 8), ids=lambda c: c.name)
def test_pieces_join_bit_for_bit(case, axis, transposed, pieces=3):
    pattern = case.pattern.T if transposed else case.pattern
    parts = pattern.split(pieces, axis)
    values = testing.normal(0, pattern.values_shape, np.float32)
    split = parts.split(values)
    assert split.shape == parts.values_shape and parts.count == pieces
    np.testing.assert_array_equal(parts.join(split), values)
    assert_same_pattern(parts.whole(), pattern)
    assert_same_pattern(parts.T.whole(), pattern.T)
    assert int(padding_of(parts).any(axis=tuple(range(2, split.ndim))).sum()) == pieces * split.shape[1] - pattern.nnzb
    piece = parts.pattern.T if transposed else parts.pattern
    check_index(piece.index, piece.grid)


@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", mostly_slow(testing.CASES[1::3], 3), ids=lambda c: c.name)
def test_pieces_make_the_product_and_padding_gets_no_gradient(case, axis, transposed):
    pattern = case.pattern.T if transposed else case.pattern
    parts = pattern.split(3, axis)
    x, blocks, bias, dy = testing.inputs(case, pattern, np.float32)

    def by_pieces(x, blocks, bias):
        return product(parts, x, parts.split(blocks)) + bias

    got = jax.jit(lambda *a: testing.value_and_gradients(by_pieces, *a))(x, blocks, bias, dy)
    truth = testing.true_products(x, blocks, bias, dy, pattern)
    dense = testing.dense_products(x, blocks, bias, dy, pattern)
    for name, value in got.items():
        testing.assert_as_close_as_dense(value, truth[name], dense[name], name)
    grad = jax.jit(jax.grad(lambda v: (product(parts, x, v) * dy).sum()))(parts.split(blocks))
    assert not np.asarray(grad)[np.asarray(padding_of(parts))].any()


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_pattern_joins(data):
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    block = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))).reshape(rows, cols)
    pattern = BlockPattern.from_mask(mask, block)
    parts = pattern.split(data.draw(st.integers(1, 15)), data.draw(st.sampled_from([0, 1])))
    assert_same_pattern(parts.whole(), pattern)
    values = testing.normal(0, pattern.values_shape, np.float32)
    np.testing.assert_array_equal(parts.join(parts.split(values)), values)
    dense = np.asarray(pattern.to_dense(values), np.float64)
    x = np.arange(2.0 * rows, dtype=np.float32).reshape(2, rows)
    np.testing.assert_allclose(product(parts, jnp.asarray(x), parts.split(values)), x @ dense, rtol=1e-4, atol=1e-4)


def test_pieces_of_16_bit_indices_keep_them():
    pattern = BlockPattern.random(jax.random.key(0), (64, 48), density=0.2)
    narrow = BlockPattern.of_index(
        pattern.index._replace(row_index=pattern.row_index.astype(jnp.uint16)), pattern.shape, pattern.block
    )
    for axis in (0, 1):
        parts = narrow.split(4, axis)
        assert parts.pattern.row_index.dtype == jnp.uint16
        assert_same_pattern(parts.whole(), narrow)


def test_joining_works_under_a_trace():
    parts = BlockPattern.random(jax.random.key(0), (64, 48), density=0.2, block=4).split(4, 0)
    values = testing.normal(0, (parts.nnzb, 4, 4), np.float32)
    back = jax.jit(lambda parts, v: parts.join(parts.split(v)))(parts, values)
    np.testing.assert_array_equal(back, values)


PATTERN = BlockPattern.random(jax.random.key(0), (16, 12), density=0.5)
WRONG = {
    "axis": (lambda: PATTERN.split(2, 2), "axis=2: 0 cuts the inputs"),
    "pieces": (lambda: PATTERN.split(0, 1), "0 pieces: there must be at least one"),
    "a trace": (lambda: jax.jit(lambda p: p.split(2, 1).pattern)(PATTERN), "must be concrete: call split outside jit"),
    "a stack": (lambda: PATTERN.split(2, 1).pattern.split(2, 1), "carry 1 leading axes"),
    "values": (lambda: PATTERN.split(2, 1).split(jnp.ones(3)), r"shape \(3,\), but the whole pattern stores \(96,\)"),
    "pieces' values": (lambda: PATTERN.split(2, 1).join(jnp.ones((1, 48))), r"the 2 pieces store \(2, 48\)"),
    "one of several": (lambda: PATTERN.split(2, 1).own, "there are 2 pieces here, not one"),
    "an input": (
        lambda: PATTERN.split(2, 0).fit(jnp.ones((3, 16))),
        r"a piece takes 8 inputs, got x of shape \(3, 16\)",
    ),
    "features": (lambda: PATTERN.split(2, 0).slices(jnp.ones((3, 8))), "has 16 features along axis 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_the_numbers(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
