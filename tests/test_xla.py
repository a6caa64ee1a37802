"""The XLA back end's own promises: both unstructured ways agree, long columns don't make the others wait."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import BlockPattern, _xla, _xla_walk, block_diag_matmul, sddmm, spmm, testing, why_not

MASK = np.random.default_rng(0).random((200, 300)) < 0.1


def arguments(block=1, dtype=jnp.float32):
    pattern = BlockPattern.from_mask(MASK, block)
    x = testing.normal(0, (16, 200), dtype)
    return (x, testing.normal(1, pattern.values_shape, dtype), pattern.index), {
        "shape": pattern.shape,
        "block": pattern.block,
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_expanding_and_slots_give_the_same_product(transposed, monkeypatch):
    (x, values, index), sizes = arguments()
    x = testing.normal(0, (16, 300 if transposed else 200), jnp.float32)
    results = []
    for crossover in (0.0, 1.0):
        monkeypatch.setattr(_xla, "SLOTS_BELOW", crossover)
        lowered = jax.jit(lambda: _xla.spmm(x, values, index, transposed=transposed, **sizes)).lower().as_text()
        assert ("while" in lowered) == (crossover == 1.0)  # slots loop, expanding does not
        results.append(_xla.spmm(x, values, index, transposed=transposed, **sizes))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The ways of devices that are no CPU, on the CPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["149x698 by 16", "tall blocks of 32x16", "empty rows and columns, blocks of 4"])
def test_expanded_blocks_make_the_products_of_the_walk(name, transposed, as_on_a_gpu):
    case = next(case for case in testing.CASES if case.name == name)
    pattern = case.pattern.T if transposed else case.pattern
    x, blocks, bias, dy = testing.inputs(case, pattern, jnp.float32)
    product = lambda x, w, b: spmm(x, w, pattern, b, backend="xla")  # noqa: E731
    assert "while" not in jax.jit(product).lower(x, blocks, bias).as_text()
    got = testing.value_and_gradients(product, x, blocks, bias, dy)
    dense = testing.dense_products(x, blocks, bias, dy, pattern)
    for which, truth in testing.true_products(x, blocks, bias, dy, pattern).items():
        testing.assert_as_close_as_dense(got[which], truth, dense[which], which)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "name", ["149x698 by 16", "empty rows and columns, blocks of 4", "empty rows and columns, unstructured"]
)
def test_what_is_too_large_to_expand_is_walked_by_a_number_of_steps_that_no_pattern_changes(
    name, transposed, as_on_a_gpu, monkeypatch
):
    monkeypatch.setattr(_xla, "DENSE_LIMIT", 0)
    case = next(case for case in testing.CASES if case.name == name)
    pattern = case.pattern.T if transposed else case.pattern
    x, blocks, bias, dy = testing.inputs(case, pattern, jnp.float32)
    sizes = {"shape": case.pattern.shape, "block": case.pattern.block, "transposed": transposed}
    product = lambda x, w, b, index: _xla.spmm(x, w, index, b, **sizes)  # noqa: E731
    steps = str(jax.make_jaxpr(product)(x, blocks, bias, pattern.index))
    assert "while" not in steps and "scan" in steps
    got = testing.value_and_gradients(lambda x, w, b: spmm(x, w, pattern, b, backend="xla"), x, blocks, bias, dy)
    dense = testing.dense_products(x, blocks, bias, dy, pattern)
    for which, truth in testing.true_products(x, blocks, bias, dy, pattern).items():
        testing.assert_as_close_as_dense(got[which], truth, dense[which], which)


def test_a_gpu_walks_only_over_blocks_of_a_matrix_too_large_to_be_expanded(monkeypatch):
    pattern = BlockPattern.random(jax.random.key(0), (64, 96), density=0.5, block=16)
    x, w = jnp.ones((8, 64)), jnp.ones(pattern.values_shape)

    def loops(platform):
        step = lambda x, w: jax.grad(lambda x, w: spmm(x, w, pattern, backend="xla").sum(), (0, 1))(x, w)  # noqa: E731
        return "while" in jax.jit(step).trace(x, w).lower(lowering_platforms=(platform,)).as_text()

    assert not loops("cuda") and loops("cpu")
    monkeypatch.setattr(_xla, "DENSE_LIMIT", 64 * 96 - 1)
    assert loops("cuda")


def test_both_sampled_products_agree(monkeypatch):
    (x, _, index), sizes = arguments()
    dy, results = testing.normal(2, (16, 300), jnp.float32), []
    for crossover in (0.0, 1.0):
        monkeypatch.setattr(_xla, "CHUNKS_BELOW", crossover)
        results.append(_xla.sddmm(x, dy, index, **sizes))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def steps_times_width(mask, monkeypatch) -> int:
    """How many (column, slot) pairs the walk computes: what it costs."""
    pattern, counted = BlockPattern.from_mask(mask), []

    def step(source, entry, acc):
        jax.debug.callback(lambda: counted.append(acc.shape[0]))
        return acc

    _xla_walk.walk(step, jnp.zeros((mask.shape[1], 1)), pattern.index, False, 1, mask.shape[0])
    jax.effects_barrier()
    return sum(counted)


def test_one_full_column_does_not_make_the_others_wait(monkeypatch):
    mask = np.zeros((100, 512), bool)
    mask[:10] = True
    even = steps_times_width(mask, monkeypatch)
    mask[:, 7] = True
    assert even == mask[:10].size
    assert steps_times_width(mask, monkeypatch) <= even + 90 * 512 // 8  # all columns would be 90 * 512 more


@pytest.mark.parametrize("activation", [None, *_xla.ACTIVATIONS])
def test_bias_and_activation_round_once_in_half_precision(activation):
    (x, blocks, index), sizes = arguments(8, jnp.bfloat16)
    bias = testing.normal(3, (300,), jnp.bfloat16)
    got = _xla.spmm(x, blocks, index, bias=bias, activation=activation, **sizes)
    wide = (a.astype(jnp.float32) for a in (x, blocks))
    want = _xla.spmm(*wide, index, bias=bias, activation=activation, **sizes).astype(jnp.bfloat16)
    assert (np.asarray(got) == np.asarray(want)).mean() > 0.99  # sums may differ in the last bit of float32
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_every_product_is_lowered_for_every_platform(platform):
    entries = BlockPattern.random(jax.random.key(0), (24, 16), density=0.3)
    x, dy, blocks = jnp.ones((4, 24), jnp.float16), jnp.ones((4, 16), jnp.float16), jnp.ones((2, 12, 8), jnp.float16)
    for f, *operands in (
        (spmm, x, jnp.ones(entries.values_shape, jnp.float16), entries),
        (sddmm, x, dy, entries),
        (block_diag_matmul, x, blocks),
    ):
        assert why_not("xla", f.__name__, jnp.float16, (1, 1), platform) is None
        traced = jax.jit(functools.partial(f, backend="xla")).trace(*operands)
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
