"""The order in which a matrix is nearest to a block-diagonal one."""

import numpy as np
import pytest

from jaxsparse import block_diag_matmul
from jaxsparse.surgery import block_diagonal_order


def blocks_of(w, n):
    i, o = w.shape[0] // n, w.shape[1] // n
    return np.stack([w[k * i : (k + 1) * i, k * o : (k + 1) * o] for k in range(n)])


def planted(n, i, o, noise):
    """A block-diagonal matrix in noise, and the same with rows and columns shuffled."""
    rng = np.random.default_rng(0)
    w = np.kron(np.eye(n), np.ones((i, o))) * rng.normal(size=(n * i, n * o))
    w = (w + noise * rng.normal(size=w.shape)).astype(np.float32)
    return w, w[rng.permutation(n * i)][:, rng.permutation(n * o)]


@pytest.mark.parametrize("n, i, o, noise", [(1, 6, 4, 0), (4, 8, 12, 0), (8, 16, 16, 0.3), (12, 16, 64, 0.4)])
def test_planted_blocks_are_found_again(n, i, o, noise):
    w, shuffled = planted(n, i, o, noise)
    rows, columns = block_diagonal_order(shuffled, n)
    assert sorted(rows) == list(range(n * i)) and sorted(columns) == list(range(n * o))
    found = blocks_of(shuffled[rows][:, columns], n)
    assert np.square(found).sum() == pytest.approx(np.square(blocks_of(w, n)).sum())


def test_it_is_never_worse_than_the_order_as_it_is():
    for seed in range(10):
        w = np.random.default_rng(seed).normal(size=(24, 16))
        rows, columns = block_diagonal_order(w, 8)
        assert np.square(blocks_of(w[rows][:, columns], 8)).sum() >= np.square(blocks_of(w, 8)).sum()
    w, _ = planted(4, 8, 12, 0)
    rows, columns = block_diagonal_order(w, 4)
    assert (rows == np.arange(32)).all() and (columns == np.arange(48)).all()


def test_the_product_in_that_order_is_the_formula_of_the_docstring():
    _, w = planted(4, 8, 12, 0)
    x, y = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32), np.empty((3, 48), np.float32)
    rows, columns = block_diagonal_order(w, 4)
    y[..., columns] = block_diag_matmul(x[..., rows], blocks_of(w[rows][:, columns], 4))
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-5)


def test_sizes_that_are_not_to_be_cut_are_refused():
    with pytest.raises(ValueError, match=r"\(24, 16\) is not to be cut into 5"):
        block_diagonal_order(np.ones((24, 16)), 5)
