"""Patterns: exact counts, valid indices, edges, conversions, and what the constructors refuse."""

import sys

import evenness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sweeps import mostly_slow

from jaxsparse import BlockPattern, reference, testing

KEY = jax.random.key(0)


def check_valid(pattern):
    """Both orders agree with a pattern rebuilt from its coordinates, and with the grid."""
    stored = pattern.T if pattern.transposed else pattern
    rows, cols = np.asarray(stored.rows), np.asarray(stored.cols)
    again = BlockPattern.from_indices(rows, cols, shape=stored.shape, block=stored.block)
    for a, b in zip(stored.index, again.index, strict=True):
        assert a.dtype == jnp.int32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", mostly_slow(testing.CASES, 2), ids=lambda c: c.name)
def test_every_case_is_valid_and_round_trips(case):
    pattern = case.pattern
    check_valid(pattern)
    assert pattern.nnzb == np.asarray(pattern.to_mask())[:: pattern.block[0], :: pattern.block[1]].sum()
    x, blocks, _, _ = testing.inputs(case, pattern, jnp.float32)
    for p in (pattern, pattern.T):
        dense = reference.densify(blocks, p)
        np.testing.assert_array_equal(p.to_dense(blocks), dense)
        np.testing.assert_array_equal(p.gather(p.to_dense(blocks)), blocks)
        np.testing.assert_array_equal(p.to_scipy(blocks).toarray(), dense)
    again = BlockPattern.from_mask(pattern.to_mask(), pattern.block)
    jax.tree.map(np.testing.assert_array_equal, again.index, pattern.index)


@pytest.mark.parametrize("shape,block,density", [((149, 698), 1, 0.1), ((640, 3081), (16, 32), 0.37), ((7, 5), 2, 0.5)])
def test_random_has_the_exact_count_in_equal_columns(shape, block, density):
    pattern = BlockPattern.random(KEY, shape, density=density, block=block)
    check_valid(pattern)
    assert pattern.nnzb == round(density * pattern.grid[0] * pattern.grid[1])
    counts = np.diff(pattern.col_ptr)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("density", [0.01, 0.2, 0.45, 0.9])
def test_random_reaches_every_input_about_equally(density):
    keys = jax.random.split(KEY, 200)
    rows = jax.vmap(lambda k: BlockPattern.random(k, (60, 100), density=density).row_index)(keys)
    share = np.bincount(np.asarray(rows).ravel(), minlength=60) / (200 * 100 * density)
    assert 0.7 < share.min() and share.max() < 1.4


@pytest.mark.parametrize("grid, count", evenness.GRIDS, ids=str)
def test_every_place_is_equally_likely(grid, count):
    shape, density = (2 * grid[0] - 1, 3 * grid[1] - 1), count / (grid[0] * grid[1])  # ragged in both directions

    @jax.jit
    @jax.vmap
    def drawn(key):
        pattern = BlockPattern.random(key, shape, density=density, block=(2, 3))
        return jnp.zeros(grid, bool).at[pattern.rows, pattern.cols].set(True)

    for seed in range(3):
        marked = np.asarray(drawn(jax.random.split(jax.random.key(seed), 10_000)))
        evenness.assert_equally_likely(marked.reshape(10_000, -1), count)


def test_strata_alone_are_found_uneven():
    rng = np.random.default_rng(0)
    marked = np.zeros((10_000, 5), bool)
    for low, high in ((0, 3), (3, 5)):
        marked[np.arange(10_000), rng.integers(low, high, 10_000)] = True
    with pytest.raises(AssertionError, match="squared deviations"):
        evenness.assert_equally_likely(marked, 2)


def test_the_inputs_of_a_column_are_spread_out():
    pattern = BlockPattern.random(KEY, (60, 40), density=0.1)
    rows = np.asarray(pattern.row_index).reshape(40, 6)
    for column in rows:  # some rotation puts one row into each of the six strata
        assert any((np.sort((column + turn) % 60 // 10) == np.arange(6)).all() for turn in range(10))


def test_random_is_the_same_jitted_or_not_and_traceable():
    make = lambda key: BlockPattern.random(key, (100, 90), density=0.3, block=8)  # noqa: E731
    eager, jitted, abstract = make(KEY), jax.jit(make)(KEY), jax.eval_shape(make, KEY)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    assert jax.tree.map(jnp.shape, abstract.index) == jax.tree.map(jnp.shape, eager.index)
    keys = jax.random.split(KEY, 3)
    stacked = jax.vmap(make)(keys)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), stacked, make(keys[1]))
    other = make(jax.random.key(1))
    assert (np.asarray(other.row_index) != np.asarray(eager.row_index)).any()


def test_random_with_more_than_65535_entries_a_column():
    pattern = BlockPattern.random(KEY, (140_000, 2), density=0.7)
    check_valid(pattern)
    assert pattern.nnzb == 196_000


def test_a_large_pattern_takes_little_memory():
    make = jax.jit(lambda key: BlockPattern.random(key, (4096, 4096), density=0.1))
    memory = make.lower(KEY).compile().memory_analysis()
    result = 3 * 4 * round(0.1 * 4096 * 4096)
    assert memory.temp_size_in_bytes < 4 * result  # a matrix of random numbers would be 67 MB of 20 MB


def lines_run(make):
    """How many lines of Python `make` runs."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        make()
    finally:
        sys.settrace(before)
    return count


def test_a_pattern_is_built_without_a_loop_over_its_entries_or_rows():
    def constructed(size):
        pattern = BlockPattern.random(KEY, (size, size), density=0.5)
        rows, cols, mask = (np.asarray(a) for a in (pattern.rows, pattern.cols, pattern.to_mask()))
        return [
            lambda: BlockPattern.random(KEY, (size, size), density=0.5),
            lambda: BlockPattern.from_indices(rows, cols, shape=(size, size)),
            lambda: BlockPattern.from_mask(mask),
            lambda: BlockPattern.from_scipy(scipy.sparse.coo_array(mask)),
        ]

    for small, large in zip(constructed(16), constructed(256), strict=True):
        small(), large()  # compiled
        assert abs(lines_run(large) - lines_run(small)) < 128  # of rows there are 240 more


def test_transposing_moves_nothing():
    pattern = BlockPattern.random(KEY, (100, 90), density=0.3, block=(8, 5))
    view = pattern.T
    assert all(a is b for a, b in zip(view.index, pattern.index, strict=True))
    assert (view.shape, view.block, view.transposed) == ((90, 100), (5, 8), True)
    assert view.values_shape == pattern.values_shape
    assert (view.T.shape, view.T.transposed) == (pattern.shape, False)
    np.testing.assert_array_equal(view.rows, pattern.cols)


def test_a_pattern_is_a_pytree_whose_static_part_is_its_sizes():
    make = lambda seed: BlockPattern.random(jax.random.key(seed), (64, 64), density=0.5, block=16)  # noqa: E731
    assert jax.tree.structure(make(0)) == jax.tree.structure(make(1))
    assert jax.tree.structure(make(0)) != jax.tree.structure(make(0).T)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(make(0))]
    assert all("64x64_by_16x16" in path for path in paths)
    for other in (None, np.dtype("int32"), 3):  # as trees of specs, dtypes and places have
        assert "BlockPattern(64x64" in repr(jax.tree.map(lambda _, other=other: other, make(0)))
    assert repr(make(0)) == "BlockPattern(64x64, block=(16, 16), nnzb=8, density=0.5)"


def test_from_dense_keeps_the_blocks_of_largest_norm():
    w = np.asarray(testing.normal(0, (40, 36), jnp.float32))
    pattern = BlockPattern.from_dense(w, density=0.3, block=(8, 6))
    norms = np.square(w.reshape(5, 8, 6, 6)).sum(axis=(1, 3))
    kept = np.zeros((5, 6), bool)
    kept[np.asarray(pattern.rows), np.asarray(pattern.cols)] = True
    assert pattern.nnzb == 9 and norms[kept].min() >= norms[~kept].max()
    ties = BlockPattern.from_dense(np.ones((4, 4)), density=0.25)
    assert np.asarray(ties.to_mask())[0].all()
    by_score = BlockPattern.from_dense(w, density=1 / 30, block=(8, 6), score=-norms)
    assert norms[int(by_score.rows[0]), int(by_score.cols[0])] == norms.min()


def test_banded_block_diagonal_and_union():
    banded = np.asarray(BlockPattern.banded((6, 9), 1).to_mask())
    r, c = np.indices((6, 9))
    np.testing.assert_array_equal(banded, abs(r - c) <= 1)
    diagonal = BlockPattern.block_diagonal(3, (2, 4))
    np.testing.assert_array_equal(diagonal.to_mask(), np.kron(np.eye(3), np.ones((2, 4))) > 0)
    a, b = (BlockPattern.random(jax.random.key(s), (30, 20), density=0.2, block=4) for s in (0, 1))
    np.testing.assert_array_equal(a.union(b).to_mask(), np.asarray(a.to_mask()) | np.asarray(b.to_mask()))


@pytest.mark.parametrize("block", [1, (8, 16)])
def test_flops_at_density_1_are_what_xla_counts_for_the_dense_product(block):
    pattern = BlockPattern.random(KEY, (64, 32), density=1, block=block)
    dense = jax.jit(jnp.matmul).lower(jnp.ones((6, 64)), jnp.ones((64, 32))).cost_analysis()
    assert pattern.flops(6) == pattern.T.flops(6) == dense["flops"] == 6 * 64 * 32 * 2
    assert BlockPattern.random(KEY, (64, 32), density=0.25, block=block).flops(6) == pattern.flops(6) // 4


def test_effective_fans():
    pattern = BlockPattern.random(KEY, (200, 100), density=0.1)
    assert (pattern.fan_in, pattern.fan_out) == (20, 10)
    assert BlockPattern.random(KEY, (20, 10), density=0.0).fan_in == 1


ROWS, COLS = np.array([0, 2, 1]), np.array([0, 0, 1])
EYE = np.eye(4)
REFUSED = {
    "density above 1": (lambda: BlockPattern.random(KEY, (8, 8), density=1.5), r"density=1.5 is outside \[0, 1\]"),
    "density NaN": (lambda: BlockPattern.random(KEY, (8, 8), density=float("nan")), "outside"),
    "negative density": (lambda: BlockPattern.from_dense(EYE, density=-0.1), "density=-0.1"),
    "density that keeps nothing": (
        lambda: BlockPattern.random(KEY, (20, 10), density=1e-4),
        r"0.0001 x 200 = 0.02, rounded 0. Give a density of at least 1 / 200 = 0.005; density=0 if nothing",
    ),
    "blocks of which none is kept": (
        lambda: BlockPattern.from_dense(EYE, density=0.1, block=2),
        r"4 blocks of \(2, 2\): 0.1 x 4 = 0.4, rounded 0.*1 / 4 = 0.25, or smaller blocks",
    ),
    "block too large": (lambda: BlockPattern.random(KEY, (8, 40), density=1, block=16), "16 > in=8.*at most"),
    "block of zero": (lambda: BlockPattern.random(KEY, (8, 8), density=1, block=0), r"at least \(1, 1\)"),
    "a triple block": (lambda: BlockPattern.banded((8, 8), 1, (1, 2, 3)), "neither an int nor a pair"),
    "a float block": (lambda: BlockPattern.banded((8, 8), 1, 2.0), "neither an int nor a pair"),
    "a scalar shape": (lambda: BlockPattern.random(KEY, 8, density=1), "not a pair of ints"),
    "empty shape": (lambda: BlockPattern.random(KEY, (0, 8), density=1), "in=0 is outside 1 to"),
    "size overflow": (lambda: BlockPattern.random(KEY, (2**31, 8), density=0), "in=2147483648 is outside"),
    "count overflow": (
        lambda: jax.eval_shape(lambda: BlockPattern.random(KEY, (2**20, 2**20), density=0.5)),
        "keeps 549755813888, more than int32 can index.*larger blocks",
    ),
    "unsorted": (lambda: BlockPattern.from_indices(ROWS[::-1], COLS[::-1], shape=(4, 4)), "unsorted.*lexsort"),
    "unsorted rows": (lambda: BlockPattern.from_indices([2, 0], [0, 0], shape=(4, 4)), r"\(2, 0\), \(0, 0\)"),
    "duplicate": (lambda: BlockPattern.from_indices([0, 0], [1, 1], shape=(4, 4)), "duplicate entries at positions 0"),
    "row out of range": (lambda: BlockPattern.from_indices(ROWS, COLS, shape=(2, 4)), "row index 2.*outside 0 to 1"),
    "negative column": (lambda: BlockPattern.from_indices([0], [-1], shape=(4, 4)), "column index -1"),
    "block units": (lambda: BlockPattern.from_indices([4], [0], shape=(8, 8), block=2), "count blocks, not features"),
    "float indices": (lambda: BlockPattern.from_indices([0.5], [1], shape=(4, 4)), "must be integers, got float64"),
    "lengths": (lambda: BlockPattern.from_indices([0, 1], [1], shape=(4, 4)), "one length"),
    "a mask vector": (lambda: BlockPattern.from_mask(np.ones(4)), "got 1 dimensions"),
    "a weight cube": (lambda: BlockPattern.from_dense(np.ones((2, 2, 2)), density=1), "got 3 dimensions"),
    "score shape": (lambda: BlockPattern.from_dense(EYE, density=1, block=2, score=EYE), r"grid of \(2, 2\)"),
    "score NaN": (lambda: BlockPattern.from_dense(EYE * np.nan, density=1), "16 NaN"),
    "bandwidth": (lambda: BlockPattern.banded((8, 8), -1), "bandwidth=-1"),
    "other union": (lambda: BlockPattern.banded((8, 8), 1).union(BlockPattern.banded((8, 9), 1)), "one shape"),
    "dense to from_scipy": (lambda: BlockPattern.from_scipy(EYE), "got ndarray"),
    "dense to from_bcoo": (lambda: BlockPattern.from_bcoo(EYE), "wanted a BCOO"),
    "dense to from_bcsr": (lambda: BlockPattern.from_bcsr(EYE), "wanted a BCSR"),
    "gather shape": (lambda: BlockPattern.banded((4, 8), 1).gather(jnp.ones((8, 4))), r"\(4, 8\), got \(8, 4\)"),
    "values shape": (lambda: BlockPattern.banded((4, 4), 0).to_dense(jnp.ones(3)), r"\(3,\), but the pattern stores"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_raises_with_the_numbers(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 3 * 2**16])
def test_indices_of_many_rows_are_sorted_into_row_order(size):
    rows, cols = np.array([0, 7, 2**16 - 1, size - 1, 1, size - 1]), np.array([0, 0, 0, 1, 2, 2])
    keep = np.append(True, (np.diff(rows) != 0) | (np.diff(cols) != 0))
    pattern = BlockPattern.from_indices(rows[keep], cols[keep], shape=(size, 3))
    order = np.lexsort((cols[keep], rows[keep]))
    np.testing.assert_array_equal(pattern.order, order)
    np.testing.assert_array_equal(pattern.col_index, cols[keep][order])
    np.testing.assert_array_equal(pattern.row_ptr, np.searchsorted(rows[keep][order], np.arange(size + 1)))


def test_a_pattern_does_not_change_with_the_arrays_that_it_was_made_of():
    memory = np.zeros(4 * 64 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # aligned as JAX wants memory that it shares
    rows = memory[start : start + 4 * 64].view(np.int32)
    rows[:] = np.arange(64)
    pattern = BlockPattern.from_indices(rows, np.zeros(64, np.int32), shape=(64, 1))
    rows[:] = 0
    np.testing.assert_array_equal(pattern.row_index, np.arange(64))
