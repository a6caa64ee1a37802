"""Random patterns drawn without JAX: valid, even, and of torch's seed."""

import evenness
import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import numpy as np
import torch

from jaxsparse.formats import BlockPattern
from torch_bridge import BlockSparseLinear, SparseLinear
from torch_bridge._draw import inside, random_index
from torch_bridge._stored import asked_for

GRIDS = [
    ((1, 1), 1),
    ((7, 5), 1),
    ((7, 5), 3),  # columns without an entry
    ((7, 5), 17),
    ((7, 5), 35),  # full
    ((3, 64), 100),
    ((64, 3), 100),
    ((2**16 + 3, 2), 40),  # rows beyond 16 bits
]


def columns_of(index):
    return np.repeat(np.arange(len(index[0]) - 1), np.diff(index[0].numpy()))


@pytest.mark.parametrize("grid, count", GRIDS, ids=str)
def test_a_drawn_index_is_what_its_coordinates_give(grid, count):
    torch.manual_seed(0)
    index = random_index(grid, count)
    pattern = BlockPattern.from_indices(index[1].numpy(), columns_of(index), shape=grid, block=(1, 1))
    assert all(a.dtype == torch.int32 for a in index) and len(index[1]) == count
    for ours, theirs in zip(index, pattern.index, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("grid, count", GRIDS, ids=str)
def test_columns_are_equal_to_within_one(grid, count):
    counts = np.diff(random_index(grid, count)[0].numpy())
    assert counts.max() - counts.min() <= 1 and counts.sum() == count


def test_the_rows_of_a_column_are_spread_out():
    rows = random_index((60, 40), 40 * 6)[1].numpy().reshape(40, 6)
    for column in rows:  # some rotation puts one row into each of the six strata
        assert any((np.sort((column + turn) % 60 // 10) == np.arange(6)).all() for turn in range(10))


@pytest.mark.parametrize("grid, count", evenness.GRIDS, ids=str)
def test_every_place_is_equally_likely(grid, count):
    torch.manual_seed(0)
    marked = np.zeros((1000, *grid), bool)
    for one in marked:
        index = random_index(grid, count)
        one[index[1].numpy(), columns_of(index)] = True
    evenness.assert_equally_likely(marked.reshape(1000, -1), count)


def test_torchs_seed_decides_it_whatever_the_default_device_and_dtype_are():
    torch.manual_seed(3)
    first, second = random_index((20, 30), 100), random_index((20, 30), 100)
    torch.manual_seed(3)
    with torch.device("meta"):
        again = random_index((20, 30), 100)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("shape, block", [((23, 37), (4, 8)), ((23, 40), (4, 8)), ((24, 37), (4, 8)), ((5, 5), (5, 3))])
def test_what_lies_inside_is_what_the_pattern_says(shape, block):
    stored = asked_for(shape, 0.8, block, None, None)
    pattern = BlockPattern.from_indices(stored.index[1].numpy(), columns_of(stored.index), shape=shape, block=block)
    np.testing.assert_array_equal(inside(stored.index, shape, block).numpy(), pattern.edge_mask())


def test_nothing_lies_outside_where_blocks_divide_the_matrix():
    assert inside(random_index((6, 5), 9), (24, 40), (4, 8)) is None


def test_a_transposed_pattern_keeps_its_edge():
    stored = asked_for((23, 37), 0.8, (4, 8), None, None)
    pattern = BlockPattern.from_indices(stored.index[1].numpy(), columns_of(stored.index), shape=(23, 37), block=(4, 8))
    layer = BlockSparseLinear(37, 23, pattern=pattern.T)
    assert layer.weight.shape == pattern.values_shape
    np.testing.assert_array_equal((layer.weight != 0).numpy(), pattern.edge_mask())


WRONG = {
    "density 0": (lambda: SparseLinear(8, 12, 0.0), r"density=0 leaves a layer without a weight.*\(8, 12\), density=0"),
    "keeps nothing": (lambda: SparseLinear(8, 12, 0.001), r"density=0.001 keeps nothing of a \(8, 12\).*1 / 96"),
    "above 1": (lambda: SparseLinear(8, 12, 1.5), r"density=1.5 is outside \[0, 1\]"),
    "below 0": (lambda: SparseLinear(8, 12, -0.1), r"density=-0.1 is outside \[0, 1\]"),
    "no block": (lambda: BlockSparseLinear(8, 12, 0.5, "4"), "block='4' is neither an int nor a pair of ints"),
    "a set": (lambda: BlockSparseLinear(8, 12, 0.5, {2, 4}), "is neither an int nor a pair of ints"),
    "three sizes": (lambda: BlockSparseLinear(8, 12, 0.5, (2, 2, 2)), "is neither an int nor a pair of ints"),
    "large block": (lambda: BlockSparseLinear(8, 12, 0.5, (4, 16)), r"block of \(4, 16\) is larger.*at most \(4, 12\)"),
    "fractions": (lambda: SparseLinear(8.5, 12, 0.5), "is not a pair of ints"),
    "no features": (lambda: SparseLinear(0, 12, 0.5), "in=0 is outside 1 to"),
    "no pattern": (
        lambda: SparseLinear(8, 12, pattern=torch.ones(8, 12)),
        "the pattern is a Tensor, not a BlockPattern",
    ),
}


@pytest.mark.parametrize("make, reason", WRONG.values(), ids=WRONG)
def test_what_cannot_be_drawn_is_refused_with_a_way_out(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize("block", [4, np.int64(4), np.array(4), (4, 4), [4, 4], np.array([4, 4]), torch.Size((4, 4))])
def test_a_block_is_an_int_or_a_pair_of_any_kind(block):
    assert BlockSparseLinear(8, 12, 0.5, block).weight.shape == (3, 4, 4)
