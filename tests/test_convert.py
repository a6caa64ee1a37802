"""Dense matrices to sparse ones: the error that is reported, and permutations that are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import BlockPattern, NMPattern, block_diag_matmul, convert
from jaxsparse._norms import relative_error

RNG = np.random.default_rng(0)


def of_blocks(w):
    return BlockPattern.from_dense(w, density=0.3, block=(7, 5))


def of_groups(w):
    return NMPattern.from_dense(w, n=2, m=4)


@pytest.mark.parametrize("make", [of_blocks, of_groups])
def test_the_relative_error_is_that_of_the_difference(make):
    w = RNG.normal(size=(45, 70)).astype(np.float32)
    pattern = make(w)
    rest = w - np.asarray(pattern.to_dense(pattern.gather(jnp.asarray(w))))
    assert convert.relative_error(w, pattern) == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(w))
    assert convert.relative_error(w.T, pattern.T) == pytest.approx(convert.relative_error(w, pattern))
    assert convert.relative_error(np.zeros((45, 70)), pattern) == 0
    assert [relative_error(np.zeros(3), np.full(3, x)) for x in (0.0, 2.0)] == [0, 1]
    with pytest.raises(ValueError, match=r"w is \(70, 45\)"):
        convert.relative_error(w.T, pattern)


@pytest.mark.parametrize("num_blocks,i,o", [(2, 8, 8), (8, 16, 12), (16, 4, 6)])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_hidden_block_diagonal_is_found_again(num_blocks, i, o, noise):
    w = np.array(BlockPattern.block_diagonal(num_blocks, (i, o)).to_mask()) * RNG.normal(size=(num_blocks * i, 1))
    w = w * (1 + 0.5 * RNG.random(w.shape)) + noise * RNG.normal(size=w.shape)
    hidden = w[RNG.permutation(len(w))][:, RNG.permutation(w.shape[1])]
    best = convert.block_diagonalize(w, num_blocks, permute=False)
    found = convert.block_diagonalize(hidden, num_blocks)
    assert found.relative_error <= best.relative_error * 1.02 + 1e-12
    assert convert.block_diagonalize(hidden, num_blocks, permute=False).relative_error > 0.6


def test_the_result_multiplies_as_documented_and_is_never_worse_than_the_identity():
    for seed in range(5):
        w = np.random.default_rng(seed).normal(size=(24, 40)).astype(np.float32)
        blocks, rows, cols, error = convert.block_diagonalize(w, 4)
        x = jax.random.normal(jax.random.key(0), (3, 24))
        y = block_diag_matmul(x[:, rows], jnp.asarray(blocks))[:, np.argsort(cols)]
        mask = np.zeros(w.shape)
        for r, c in zip(np.split(rows, 4), np.split(cols, 4), strict=True):
            mask[np.ix_(r, c)] = 1
        np.testing.assert_allclose(y, x @ (w * mask), rtol=1e-5, atol=1e-5)
        assert error == pytest.approx(np.linalg.norm(w * (1 - mask)) / np.linalg.norm(w))
        assert error <= convert.block_diagonalize(w, 4, permute=False).relative_error
    with pytest.raises(ValueError, match="in=24 is not a whole number of 5 blocks"):
        convert.block_diagonalize(w, 5)
