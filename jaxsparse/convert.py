"""Sparse weights from dense ones: how much is lost, and the permutation under which a matrix is most block-diagonal."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxsparse import _norms
from jaxsparse.formats import Pattern


def relative_error(w: Float[Array, "in out"], pattern: Pattern) -> float:
    """||w - what the pattern keeps of w|| / ||w||, in the Frobenius norm; 0 for a matrix of zeros."""
    dense = np.asarray(w, np.float64)
    if dense.shape != pattern.shape:
        raise ValueError(f"w is {dense.shape}, but the pattern is of a {pattern.shape} matrix.")
    return _norms.relative_error(dense, np.where(pattern.to_mask(), dense, 0))


class BlockDiagonal(NamedTuple):
    """A dense matrix as diagonal blocks: x W is about `block_diag_matmul(x[:, rows], blocks)[:, argsort(cols)]`.

    Attributes:
      blocks: [num_blocks, i, o], the entries of `w[rows][:, cols]` on the diagonal.
      rows: int64 [in], which input stands where; `cols`: int64 [out], which output.
      relative_error: the norm of what is cut off, by the norm of w.
    """

    blocks: np.ndarray
    rows: Int[np.ndarray, " in"]
    cols: Int[np.ndarray, " out"]
    relative_error: float


def block_diagonalize(w: Any, num_blocks: int, *, permute: bool = True, rounds: int = 20) -> BlockDiagonal:
    """Cuts a dense matrix down to diagonal blocks, its rows and columns permuted so that little is lost.

    A heuristic, as the best permutation is NP-hard to find. One row per block is chosen, each as unlike the ones before
    as can be; columns go to the row in which they are strongest, then rows to the block whose columns hold most of
    them, and so on in turns until nothing is gained. Every block takes equally many: the row or column that would lose
    most by its second choice chooses first. The identity is kept where that is no better.

    Args:
      w: (in, out).
      num_blocks: divides both sizes.
      permute: False keeps the order as it is.
      rounds: at most so many turns.
    Raises:
      ValueError: if `num_blocks` does not divide the sizes.
    """
    w = np.asarray(w)
    for name, size in zip(("in", "out"), w.shape, strict=True):
        if num_blocks < 1 or size % num_blocks:
            raise ValueError(f"{name}={size} is not a whole number of {num_blocks} blocks: pad it, or use a divisor.")
    energy = np.square(w.astype(np.float64))
    best = np.arange(w.shape[0]), np.arange(w.shape[1])
    kept = _kept(energy, *best, num_blocks)
    groups = _unlike_rows(energy, num_blocks)
    for _ in range(rounds if permute else 0):
        cols = _deal(groups.T)
        rows = _deal(_sums(energy, cols, num_blocks))
        new = _kept(energy, rows, cols, num_blocks)
        if new <= kept * (1 + 1e-12):
            break
        best, kept = (rows, cols), new
        groups = _sums(energy.T, rows, num_blocks).T
    rows, cols = best
    blocks = w[rows][:, cols].reshape(num_blocks, w.shape[0] // num_blocks, num_blocks, -1)
    at, diagonal = np.arange(num_blocks), np.zeros_like(blocks)
    diagonal[at, :, at] = blocks[at, :, at]
    return BlockDiagonal(blocks[at, :, at], rows, cols, _norms.relative_error(blocks, diagonal))


def _unlike_rows(energy: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, the strongest first, then each time the one whose largest cosine with those is the smallest."""
    norms = np.linalg.norm(energy, axis=1)
    unit = energy / np.maximum(norms, np.finfo(float).tiny)[:, None]
    chosen = [int(norms.argmax())]
    likeness = unit @ unit[chosen[0]]
    for _ in range(count - 1):
        chosen.append(int(np.where(norms > 0, likeness, np.inf).argmin()))
        likeness = np.maximum(likeness, unit @ unit[chosen[-1]])
    return unit[chosen]


def _sums(energy: np.ndarray, cols: np.ndarray, num_blocks: int) -> np.ndarray:
    """[rows, num_blocks]: what every row has in the columns of every block."""
    return energy[:, cols].reshape(len(energy), num_blocks, -1).sum(2)


def _deal(gains: np.ndarray) -> np.ndarray:
    """The order that gives every block equally many of the items, by what each gains in each block."""
    items, num_blocks = gains.shape
    free, order = np.full(num_blocks, items // num_blocks), np.full((num_blocks, items // num_blocks), -1)
    ranked = np.sort(gains, axis=1)
    regret = ranked[:, -1] - ranked[:, -2] if num_blocks > 1 else ranked[:, -1]
    for item in np.argsort(-regret, kind="stable"):
        block = int(np.where(free > 0, gains[item], -np.inf).argmax())
        order[block, -free[block]] = item
        free[block] -= 1
    return np.sort(order, axis=1).ravel()


def _kept(energy: np.ndarray, rows: np.ndarray, cols: np.ndarray, num_blocks: int) -> float:
    pairs = zip(np.split(rows, num_blocks), np.split(cols, num_blocks), strict=True)
    return float(sum(energy[np.ix_(r, c)].sum() for r, c in pairs))
