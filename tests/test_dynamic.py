"""Moving patterns against a NumPy oracle, and what must not change: counts, kept entries, programs, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import mostly_slow, rows_mostly_slow
from test_formats import check_valid

from jaxsparse import BlockPattern, dynamic, pruning, spmm
from jaxsparse.training import dynamic as moving

KEY = jax.random.key(0)


def make(shape, density, block=(1, 1), seed=0):
    """(blocks, pattern) with values zero beyond the edge."""
    pattern = BlockPattern.random(jax.random.key(seed), shape, density=density, block=block)
    return pattern.gather(jax.random.normal(jax.random.key(seed + 1), shape)), pattern


def norms(entries, block):
    """[grid_in, grid_out] squared L2 norms of the blocks of a dense matrix, by NumPy."""
    (rows, cols), (i, o) = entries.shape, block
    padded = np.pad(np.square(entries), ((0, -rows % i), (0, -cols % o)))
    return padded.reshape(padded.shape[0] // i, i, -1, o).sum((1, 3))


def oracle(blocks, pattern, x, dy, count):
    """(mask of kept blocks, mask of grown blocks) by sorting everything, the dense gradient at hand."""
    magnitude = norms(np.asarray(pattern.to_dense(blocks)), pattern.block)
    stored = np.zeros(pattern.grid, bool)
    stored[np.asarray(pattern.rows), np.asarray(pattern.cols)] = True

    def best(score, allowed, number):  # of equal scores the first by column, then by row
        order = np.argsort(-np.where(allowed, score, -1).T.ravel(), kind="stable")[:number]
        mask = np.zeros(score.size, bool)
        mask[order] = True
        return mask.reshape(score.shape[::-1]).T

    kept = best(magnitude, stored, pattern.nnzb - count)
    return kept, best(norms(x.T @ dy, pattern.block), ~kept, count)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(moving, "CHUNK", 256)
    moving._rigl.clear_cache()
    yield
    moving._rigl.clear_cache()


CASES = [  # shape, block, density, whether the drop fraction is traced
    ((40, 33), (1, 1), 0.1, False),
    ((40, 33), (1, 1), 0.6, True),
    ((45, 70), (7, 5), 0.3, False),
    ((45, 70), (7, 5), 0.3, True),
    ((300, 9), (4, 1), 0.5, False),
]


@pytest.mark.parametrize("shape,block,density,traced", rows_mostly_slow(CASES))
def test_rigl_equals_the_oracle_with_the_dense_gradient(shape, block, density, traced, small_chunks):
    rng, ties = np.random.default_rng(0), 0
    for seed in range(40):
        _, pattern = make(shape, density, block, seed)
        # Small integers: sums are exact in any order, and ties are many.
        w, x, dy = (rng.integers(-2, 3, size).astype(np.float32) for size in (shape, (2, shape[0]), (2, shape[1])))
        dy[:, rng.random(shape[1]) < 0.9] = 0
        blocks = pattern.gather(w + 3.0)
        drop = rng.choice([0.0, 0.1, 0.3, 1.0]) if traced else 0.3
        count = round(float(np.float32(drop) * np.float32(pattern.nnzb))) if traced else round(drop * pattern.nnzb)
        kept, grown = oracle(blocks, pattern, x, dy, count)
        drop = jnp.float32(drop) if traced else drop
        new_blocks, new, _ = dynamic.rigl(blocks, pattern, (), x=x, dy=dy, drop_fraction=drop)
        check_valid(new)
        got = np.zeros(pattern.grid, bool)
        got[np.asarray(new.rows), np.asarray(new.cols)] = True
        np.testing.assert_array_equal(got, kept | grown)
        inside = np.kron(kept, np.ones(block))[: shape[0], : shape[1]]
        np.testing.assert_array_equal(new.to_dense(new_blocks), np.where(inside, w + 3.0, 0) * pattern.to_mask())
        score = norms(x.T @ dy, block)
        ties += count > 0 and (score[~kept & ~grown] == score[grown].min()).any()
    assert ties > 5


def test_rigl_of_a_transposed_view_is_the_view_of_rigl():
    blocks, pattern = make((40, 33), 0.2)
    blocks = blocks.astype(jnp.bfloat16)
    x, dy = (jax.random.normal(KEY, (2, 3, n)).astype(jnp.bfloat16) for n in pattern.shape)
    straight = dynamic.rigl(blocks, pattern, (), x=x, dy=dy, drop_fraction=0.3)
    view = dynamic.rigl(blocks, pattern.T, (), x=dy, dy=x, drop_fraction=0.3)
    np.testing.assert_array_equal(view[1].to_dense(view[0]), straight[1].to_dense(straight[0]).T)


@pytest.mark.parametrize("block,density", [((1, 1), 0.1), ((1, 1), 0.9), ((8, 5), 0.4)])
def test_set_drops_the_smallest_and_grows_everywhere_alike(block, density):
    blocks, pattern = make((40, 33), density, block)
    count = round(0.3 * pattern.nnzb)
    kept, _ = oracle(blocks, pattern, np.zeros((1, 40)), np.zeros((1, 33)), count)
    move = jax.jit(lambda key: dynamic.set_(key, blocks, pattern, (), drop_fraction=0.3)[1])
    times = np.zeros(pattern.grid[::-1])
    for key in jax.random.split(KEY, 300):
        new = move(key)
        times[np.repeat(np.arange(pattern.grid[1]), np.diff(new.col_ptr)), np.asarray(new.row_index)] += 1
    times = times.T
    check_valid(new)
    assert new.nnzb == pattern.nnzb and (times[kept] == 300).all()
    expected = 300 * count / (~kept).sum()
    spread = np.sqrt(expected * (1 - min(expected / 300, 1))) + 1e-9
    assert np.abs(times[~kept] - expected).max() < 5 * spread + 1 and times[~kept].sum() == 300 * count


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.adam(1e-2)),
    "multi_transform": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)}, {"layer": "a", "other": "b", "bias": "a"}
    ),
}


@pytest.mark.parametrize("block", [(1, 1), (128, 128)])
@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, 2))
def test_kept_entries_keep_every_moment_and_grown_ones_have_none(name, block):
    blocks, pattern = make((1024, 900) if block[0] > 1 else (64, 50), 0.2, block)
    params = {"layer": {"kernel": blocks}, "other": {"kernel": blocks + 1}, "bias": jnp.ones(7)}
    state = OPTIMIZERS[name].init(params)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jax.random.normal(jax.random.key(k), a.shape).astype(a.dtype) for k, a in enumerate(leaves)]
    state = jax.tree.unflatten(tree, leaves)
    new_blocks, new, new_state = dynamic.set_(KEY, blocks, pattern, state, drop_fraction=0.3, path=("layer", "kernel"))
    assert jax.tree.structure(new_state) == tree
    old_at, new_at = (np.asarray(p.cols) * p.grid[0] + np.asarray(p.rows) for p in (pattern, new))
    magnitude = norms(np.asarray(pattern.to_dense(blocks)), block)[np.asarray(pattern.rows), np.asarray(pattern.cols)]
    kept = np.sort(np.argsort(-magnitude, kind="stable")[: new.nnzb - round(0.3 * new.nnzb)])
    here = np.searchsorted(new_at, old_at[kept])
    moved = 0
    for (path, old), a in zip(
        jax.tree.leaves_with_path((blocks, state)), jax.tree.leaves((new_blocks, new_state)), strict=True
    ):
        where = jax.tree_util.keystr(path)
        if path[0].idx == 0 or ("layer" in where and old.ndim and len(old) == pattern.nnzb):
            moved += 1
            np.testing.assert_array_equal(np.asarray(a)[here], np.asarray(old)[kept])
            assert not np.delete(np.asarray(a), here, axis=0).any()
        else:
            np.testing.assert_array_equal(a, old)
    assert moved >= 2


def test_a_state_with_several_such_parameters_needs_a_path():
    blocks, pattern = make((20, 20), 0.2)
    state = optax.adam(1e-3).init({"a": {"kernel": blocks}, "b": {"kernel": blocks}})
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\].*path='a'"):
        dynamic.set_(KEY, blocks, pattern, state, drop_fraction=0.3)
    with pytest.raises(ValueError, match="path='c' is in none of the leaves"):
        dynamic.set_(KEY, blocks, pattern, state, drop_fraction=0.3, path="c")
    mu = dynamic.set_(KEY, blocks, pattern, jax.tree.map(jnp.ones_like, state), drop_fraction=0.3, path="b/kernel")[2][
        0
    ].mu
    assert mu["a"]["kernel"].all() and not mu["b"]["kernel"].all()
    with pytest.raises(ValueError, match="several parameters"):
        dynamic.set_(KEY, blocks, pattern, state, drop_fraction=0.3, path="kernel")
    plain = {"mu": {"a": blocks + 9, "b": blocks + 9}, "nu": {"a": blocks + 9, "b": blocks + 9}}  # as nnx.state has it
    moved = dynamic.set_(KEY, blocks, pattern, plain, drop_fraction=0.3, path="b")[2]
    assert all(m["a"].all() and not m["b"].all() for m in moved.values())
    alone = optax.adam(1e-3).init({"a": {"kernel": blocks}})
    dynamic.set_(KEY, blocks, pattern, alone, drop_fraction=0.3)


@pytest.mark.parametrize("block", [(1, 1), (8, 8)])
def test_a_whole_rigl_run_is_one_program_at_constant_nnz(block):
    blocks, pattern = make((64, 48), 0.25, block)
    optimizer, fraction = optax.adam(1e-2), optax.cosine_decay_schedule(0.3, 30)
    x, target, traced = jax.random.normal(KEY, (16, 64)), jnp.ones((16, 48)), 0

    @jax.jit
    def step(t, blocks, pattern, state):
        nonlocal traced
        traced += 1
        loss = lambda blocks, probe: jnp.square(spmm(x, blocks, pattern) + probe - target).mean()  # noqa: E731
        grads, dy = jax.grad(loss, (0, 1))(blocks, jnp.zeros_like(target))
        updates, state = optimizer.update(grads, state)
        blocks = optax.apply_updates(blocks, updates)
        move = lambda b, p, s: dynamic.rigl(b, p, s, x=x, dy=dy, drop_fraction=fraction(t))  # noqa: E731
        return jax.lax.cond(t % 3 == 2, move, lambda *same: same, blocks, pattern, state)

    state, nnzb, first = optimizer.init(blocks), pattern.nnzb, np.asarray(pattern.row_index)
    for t in range(30):
        blocks, pattern, state = step(t, blocks, pattern, state)
        assert pattern.nnzb == nnzb
        if t % 3 == 2:
            check_valid(pattern)
    assert traced == 1 and (np.asarray(pattern.row_index) != first).any()


def test_gradual_pruning_is_one_program_and_what_is_pruned_stays_zero():
    blocks, pattern = make((64, 48), 0.5)
    optimizer = optax.chain(optax.adam(1e-2), pruning.prune_updates())
    density, x, traced = pruning.polynomial(0.5, 0.1, 0, 20), jax.random.normal(KEY, (16, 64)), 0

    @jax.jit
    def step(t, blocks, mask, state):
        nonlocal traced
        traced += 1
        grads = jax.grad(lambda b: jnp.square(spmm(x, b, pattern) - 1).mean())(blocks)
        updates, state = optimizer.update(grads, state, blocks, masks=mask)
        return dynamic.gradual(optax.apply_updates(blocks, updates), pattern, state, density=density(t + 1))

    mask, state = jnp.ones(blocks.shape, bool), optimizer.init(blocks)
    for t in range(20):
        before = mask
        blocks, state, mask = step(t, blocks, mask, state)
        pruned = ~np.asarray(mask)
        assert not (np.asarray(before) < ~pruned).any()
        assert not np.asarray(blocks)[pruned].any() and not np.asarray(state[0][0].mu)[pruned].any()
        assert mask.sum() == pytest.approx(float(density(t + 1)) * 64 * 48, abs=0.51)
    assert traced == 1
    small, cut, cut_state = dynamic.compact(blocks, pattern, state, density=0.1)
    check_valid(cut)
    assert cut.nnzb == round(0.1 * 64 * 48) and cut_state[0][0].mu.shape == small.shape
    np.testing.assert_array_equal(cut.to_dense(small), pattern.to_dense(blocks))


def test_values_and_moments_move_to_a_dense_pattern_and_back():
    blocks, pattern = make((45, 70), 0.3, (7, 5))
    dense = BlockPattern.random(KEY, (45, 70), density=1, block=(7, 5))
    for old, new in ((pattern, dense), (pattern.T, dense.T)):
        wide, state = dynamic.move(blocks, old, [blocks * 2], new)
        np.testing.assert_array_equal(new.to_dense(wide), old.to_dense(blocks))
        np.testing.assert_array_equal(state[0], wide * 2)
        again, _ = dynamic.move(wide, new, (), old)
        np.testing.assert_array_equal(again, blocks)


@pytest.mark.parametrize("block,allowed", [((1, 1), 0.18), ((32, 32), 0.11)])
def test_memory_of_a_tenth_of_the_weights(block, allowed):
    """Of parameters, gradients, Adam's moments and the pattern, in arrays that are alive, against the dense ones."""

    def train(make_weight):
        before = {id(a) for a in jax.live_arrays()}
        weight, *pattern = make_weight()
        state = optax.adam(1e-3).init(weight)
        held = (weight, jax.jit(jax.grad(lambda w: jnp.square(w).sum()))(weight), state, pattern)
        jax.block_until_ready(held)
        return sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)

    def sparse():
        pattern = jax.jit(lambda: BlockPattern.random(KEY, (1024, 1024), density=0.1, block=block))()
        return jnp.ones(pattern.values_shape), pattern

    dense = train(lambda: (jnp.ones((1024, 1024)),))
    assert dense >= 4 * 4 * 1024**2
    assert 0.09 < train(sparse) / dense <= allowed


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("block", mostly_slow([(32, 32), (1, 1)]))
def test_rigl_makes_a_bounded_part_of_the_dense_gradient(block, monkeypatch):
    pattern = jax.eval_shape(lambda: BlockPattern.random(KEY, (8192, 8192), density=0.01, block=block))
    blocks, x = jax.ShapeDtypeStruct(pattern.values_shape, jnp.float32), jax.ShapeDtypeStruct((4, 8192), jnp.float32)

    def temporaries():
        move = jax.jit(lambda b, p, x: dynamic.rigl(b, p, (), x=x, dy=x, drop_fraction=0.3))
        moving._rigl.clear_cache()
        return move.lower(blocks, pattern, x).compile().memory_analysis().temp_size_in_bytes

    features = 2 * 4 * 4 * 8192
    bound = 64 * moving.CHUNK + 48 * pattern.nnzb + 2 * features
    assert temporaries() < bound < 0.2 * 4 * 8192**2
    monkeypatch.setattr(moving, "CHUNK", 2**30)
    assert temporaries() > 4 * 8192**2  # the whole gradient at once would be seen
    moving._rigl.clear_cache()


@pytest.mark.parametrize("density,batch", [(0.0, 3), (1.0, 3), (0.2, 0)])
def test_nothing_stored_everything_stored_and_no_batch(density, batch):
    blocks, pattern = make((40, 33), density)
    x, dy = (np.ones((batch, n), np.float32) for n in pattern.shape)
    _, new, _ = dynamic.rigl(blocks, pattern, (), x=x, dy=dy, drop_fraction=0.3)
    check_valid(new)
    check_valid(dynamic.set_(KEY, blocks, pattern, (), drop_fraction=0.3)[1])


def test_float64_moves(x64):
    blocks, pattern = make((40, 33), 0.2)
    x, dy = (np.ones((3, n)) for n in pattern.shape)
    blocks, new, _ = dynamic.rigl(blocks, pattern, (), x=x, dy=dy, drop_fraction=0.3)
    assert blocks.dtype == jnp.float64
    check_valid(new)


B, P = make((20, 30), 0.2)
REFUSED = {
    "fraction": (lambda: dynamic.set_(KEY, B, P, (), drop_fraction=1.5), r"1.5 is outside \[0, 1\]"),
    "values": (lambda: dynamic.set_(KEY, B[1:], P, (), drop_fraction=0.5), r"\(119,\), but the pattern stores"),
    "features": (lambda: dynamic.rigl(B, P, (), x=jnp.ones((3, 30)), dy=jnp.ones((3, 20)), drop_fraction=0.5), "got"),
    "batch": (
        lambda: dynamic.rigl(B, P, (), x=jnp.ones((3, 20)), dy=jnp.ones((4, 30)), drop_fraction=0.5),
        r"\(4, 30\)",
    ),
    "compact": (lambda: dynamic.compact(B, P, (), density=0.3), "keeps 180 blocks, but only 120"),
    "move": (lambda: dynamic.move(B, P, (), BlockPattern.banded((30, 20), 1)), "one shape, block and view"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_raise_with_the_numbers(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_grid_beyond_uint32_is_refused():
    pattern = jax.eval_shape(lambda: BlockPattern.random(KEY, (2**17, 2**17), density=1e-6))
    move = lambda p: dynamic.set_(KEY, jnp.zeros(p.nnzb), p, (), drop_fraction=0.1)  # noqa: E731
    with pytest.raises(NotImplementedError, match="uint32"):
        jax.eval_shape(move, pattern)
