"""Scores, masks, densities and schedules against their published formulas, and masked training in Optax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsparse import BlockPattern, pruning

RNG = np.random.default_rng(0)
W, GRAD, X = (RNG.normal(size=shape).astype(np.float32) for shape in ((37, 29), (37, 29), (3, 8, 37)))


def blockwise(entries, i, o):
    """The L2 norm of every block, by a loop."""
    rows, cols = (range(0, size, b) for size, b in zip(entries.shape, (i, o), strict=True))
    return np.array([[np.linalg.norm(entries[r : r + i, c : c + o]) for c in cols] for r in rows])


@pytest.mark.parametrize("block", [1, (8, 5)])
@pytest.mark.parametrize("name", ["magnitude", "saliency", "wanda"])
def test_scores_equal_their_formulas(name, block):
    wanted = {"magnitude": W, "saliency": W * GRAD, "wanda": W * np.linalg.norm(X.reshape(-1, 37), axis=0)[:, None]}
    got = pruning.score(name, W, grad=GRAD, x=X, block=block)
    wanted = np.abs(wanted[name]) if block == 1 else blockwise(wanted[name], *block)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    pattern = BlockPattern.from_dense(W, density=0.3, block=block, score=got)
    kept = np.zeros(got.shape, bool)
    kept[np.asarray(pattern.rows), np.asarray(pattern.cols)] = True
    np.testing.assert_array_equal(pruning.top_mask(got, 0.3), kept)


def test_the_random_score_has_one_number_per_block():
    score = pruning.score("random", W, key=jax.random.key(0), block=(8, 5))
    assert score.shape == (5, 6) and len(np.unique(score)) == 30


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (1, 1), (0, 2), (3, 3)])
def test_top_mask_keeps_n_of_every_m_inputs(n, m):
    scores = np.random.default_rng(0).integers(-3, 3, (24, 5)).astype(np.float32)  # with many equal ones
    mask = jax.jit(functools.partial(pruning.top_mask, n_of_m=(n, m)))(scores)
    for group in range(0, 24, m):
        for col in range(5):
            best = sorted(range(m), key=lambda k: (-scores[group + k, col], k))[:n]
            assert sorted(np.flatnonzero(mask[group : group + m, col])) == sorted(best)


def test_n_of_m_makes_a_pattern_of_that_density():
    mask = pruning.top_mask(pruning.score("magnitude", jnp.ones((8, 6))), n_of_m=(2, 4))
    pattern = BlockPattern.from_mask(mask)
    assert pattern.density == 0.5 and set(np.diff(pattern.col_ptr)) == {4}


@pytest.mark.parametrize(
    "density, n_of_m, message",
    [
        (None, None, "one of density and n_of_m"),
        (0.5, (2, 4), "one of density and n_of_m"),
        (None, (5, 4), r"n_of_m=\(5, 4\) must be"),
        (None, (-1, 4), "must be two"),
        (None, (1, 7), r"shape \(6, 4\) have no whole number of groups of 7"),
    ],
)
def test_groups_that_do_not_fit_are_refused(density, n_of_m, message):
    with pytest.raises(ValueError, match=message):
        pruning.top_mask(jnp.ones((6, 4)), density, n_of_m=n_of_m)


@pytest.mark.parametrize("seed", range(4))
def test_top_mask_keeps_the_highest_and_of_equal_ones_the_earlier(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-4, 4, (39, 33)) * rng.choice([1e-30, 0.5, 1e30])
    top_mask = jax.jit(pruning.top_mask)
    for density in (0.0, 0.01, 0.4, 0.999, 1.0):
        count = round(density * scores.size)
        wanted = np.zeros(scores.size, bool)
        wanted[np.argsort(-scores.astype(np.float32).ravel(), kind="stable")[:count]] = True
        np.testing.assert_array_equal(pruning.top_mask(scores, density).ravel(), wanted)
        if abs(density * scores.size % 1 - 0.5) > 1e-3:  # a traced density is rounded in float32
            np.testing.assert_array_equal(top_mask(scores, jnp.float32(density)).ravel(), wanted)


def test_infinities_and_signed_zeros_are_ordered():
    scores = jnp.array([-0.0, 0.0, jnp.inf, -jnp.inf, 1e-30, -1.0])
    np.testing.assert_array_equal(pruning.top_mask(scores, 3 / 6), [True, False, True, False, True, False])


@pytest.mark.parametrize("block", [1, (8, 5)])
def test_top_k_keeps_the_density_and_its_gradient_is_masked_or_straight_through(block):
    kept = np.asarray(BlockPattern.from_dense(W, density=0.2, block=block).to_mask())
    assert 0.15 < kept.mean() < 0.25
    for straight_through in (False, True):
        prune = lambda w: pruning.top_k(w, 0.2, block=block, straight_through=straight_through)  # noqa: B023, E731
        pruned, pullback = jax.vjp(prune, W)
        np.testing.assert_array_equal(pruned, np.where(kept, W, 0))
        np.testing.assert_array_equal(pullback(GRAD)[0], GRAD if straight_through else np.where(kept, GRAD, 0))


SHAPES = {"conv": (3, 3, 3, 64), "small": (64, 10), "hidden": (784, 300), "wide": (512, 2048)}


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.8, 1.0])
def test_erk_equals_the_published_formula(density):
    got = pruning.erk(SHAPES, density)
    total = sum(math.prod(s) for s in SHAPES.values())
    kept = sum(got[name] * math.prod(s) for name, s in SHAPES.items())
    assert kept == pytest.approx(density * total, abs=1e-6)
    scale = {name: d * math.prod(SHAPES[name]) / sum(SHAPES[name]) for name, d in got.items()}
    free = [scale[name] for name in SHAPES if got[name] < 1]
    np.testing.assert_allclose(free, free[:1] * len(free))  # one factor for all that are not dense
    assert all(scale[name] <= min(free, default=math.inf) * (1 + 1e-9) for name in SHAPES if got[name] == 1)
    assert density in (0.0, 1.0) or len(set(got.values())) > 1


def test_uniform_and_budget():
    assert pruning.uniform(list(SHAPES.values()), 0.1) == [0.1] * 4
    got = pruning.budget(SHAPES, 50_000)
    assert sum(d * math.prod(SHAPES[name]) for name, d in got.items()) == pytest.approx(50_000)
    assert pruning.budget([(10, 10)], 25, pruning.uniform) == [0.25]


def test_schedules_equal_their_formulas_at_every_step():
    polynomial = jax.jit(pruning.polynomial(1.0, 0.1, 10, 110))
    cyclic = jax.jit(pruning.cyclic(0.8, 0.2, 10, 110, 4, power=2))
    one_shot = jax.jit(pruning.one_shot(0.3, 50))
    for t in range(130):
        done = min(max(t - 10, 0) / 100, 1)
        sparsity = 0.9 + (0.0 - 0.9) * (1 - done) ** 3  # as Zhu & Gupta write it: s_f + (s_i - s_f)(...)^3
        assert 1 - polynomial(t) == pytest.approx(sparsity, abs=1e-6)
        in_cycle = max(t - 10, 0) % 25 / 25 if t < 110 else 1
        assert cyclic(t) == pytest.approx(0.2 + 0.6 * (1 - in_cycle) ** 2, abs=1e-5)
        assert one_shot(t) == pytest.approx(1 if t < 50 else 0.3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pruned_weights_land_on_exactly_zero(dtype):
    params = {"w": jnp.asarray(W, dtype), "b": jnp.ones(29, dtype)}
    grads = {"w": jnp.asarray(GRAD, dtype), "b": jnp.ones(29, dtype)}
    masks = {"w": pruning.top_mask(pruning.score("magnitude", W), 0.3), "b": None}
    for fixed in (True, False):
        optimizer = optax.chain(optax.adamw(1e-2), pruning.prune_updates(masks if fixed else None))
        free = optax.adamw(1e-2)
        extra = {} if fixed else {"masks": masks}
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params, **extra)
        new = optax.apply_updates(params, updates)
        wanted = optax.apply_updates(params, free.update(grads, free.init(params), params)[0])
        np.testing.assert_array_equal(new["w"], np.where(masks["w"], wanted["w"], 0))
        np.testing.assert_array_equal(new["b"], wanted["b"])


REFUSED = {
    "score": (lambda: pruning.score("size", W), "unknown score 'size'.*'wanda'"),
    "no gradient": (lambda: pruning.score("saliency", W), "needs grad="),
    "gradient": (lambda: pruning.score("saliency", W, grad=GRAD.T), r"grad must be of shape \(37, 29\)"),
    "inputs": (lambda: pruning.score("wanda", W, x=GRAD), r"x must be of shape \(37, 37\)"),
    "density": (lambda: pruning.top_mask(W, 1.2), r"outside \[0, 1\]"),
    "erk": (lambda: pruning.erk(SHAPES, -0.1), r"outside \[0, 1\]"),
    "budget": (lambda: pruning.budget([(2, 3)], 7), "outside 0 to 6"),
    "steps": (lambda: pruning.polynomial(1, 0.1, 5, 5), "end_step=5 must come after"),
    "cycles": (lambda: pruning.cyclic(1, 0.1, 0, 5, 0), "at least 1"),
    "no masks": (lambda: pruning.prune_updates().update(W, optax.EmptyState(), W), "needs masks"),
    "no params": (lambda: pruning.prune_updates(W > 0).update(W, optax.EmptyState()), "needs params"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_raise_with_the_numbers(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()
