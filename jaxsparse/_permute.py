"""The order of a dense matrix's rows and columns in which a block-diagonal one comes near it."""

from __future__ import annotations

import numpy as np

ROUNDS, STARTS = 30, 8


def block_diagonal_order(w: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(in_order, out_order) such that much of `w[in_order][:, out_order]` lies in its diagonal blocks.

    With `blocks` from there, x @ w is about y, where y[..., out_order] = block_diag_matmul(x[..., in_order], blocks).
    Between two layers the order can be absorbed: in the columns of the one before, or the rows of the one after.

    A heuristic, as the best order is NP-hard to find. Rows are dealt to blocks of equal size so that the squares
    inside of the blocks sum to much, given which columns belong to which block; then columns, given the rows; and so
    on while the sum grows. It starts from the given order, and again from columns that are unlike one another (one for
    each block, each next one with the least cosine to those before), eight times from different first ones. The best
    end is returned: never worse than the identity.

    Args:
      w: the matrix (in, out), both multiples of `num_blocks`.
    Raises:
      ValueError: if `num_blocks` does not divide both.
    Source: alternating assignment as in k-means, from k-center seeds, Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5.
    """
    energy = np.square(np.asarray(w, np.float32))
    if num_blocks < 1 or any(size % num_blocks for size in energy.shape):
        raise ValueError(f"a matrix {energy.shape} is not to be cut into {num_blocks} diagonal blocks of equal size.")
    given = np.repeat(np.arange(num_blocks), w.shape[1] // num_blocks)
    first = np.linspace(0, len(given) - 1, STARTS, dtype=int)
    seeded = [_balanced(_likeness_to_seeds(energy, num_blocks, seed)) for seed in first]
    ends = [_alternate(energy, columns, num_blocks) for columns in (given, *seeded)]
    _, rows, columns = max(ends, key=lambda end: end[0])
    return np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")


def _alternate(energy: np.ndarray, columns: np.ndarray, num_blocks: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(squares inside of the blocks, block of each row, block of each column), from the blocks of the columns."""
    member = np.eye(num_blocks, dtype=energy.dtype)  # member[block] is a row of 0 and one 1
    rows = np.repeat(np.arange(num_blocks), len(energy) // num_blocks)
    best = _inside(energy, rows, columns), rows, columns
    for _ in range(ROUNDS):
        rows = _balanced(energy @ member[columns])
        columns = _balanced(energy.T @ member[rows])
        inside = _inside(energy, rows, columns)
        if inside <= best[0]:
            break
        best = inside, rows, columns
    return best


def _inside(energy: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    return float(energy[rows[:, None] == columns].sum(dtype=np.float64))


def _likeness_to_seeds(energy: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[out, count]: the cosine of every column to column `seed` and others, all unlike one another."""
    unit = energy / np.maximum(np.linalg.norm(energy, axis=0), 1e-30)
    likeness = np.empty((energy.shape[1], count), np.float32)
    for k in range(count):
        likeness[:, k] = unit.T @ unit[:, seed]
        seed = int(likeness[:, : k + 1].max(axis=1).argmin())
    return likeness


def _balanced(gain: np.ndarray) -> np.ndarray:
    """The block of each item, [items, blocks] being what it gains there; greedy, largest regret first, equal sizes."""
    items, blocks = gain.shape
    room = np.full(blocks, items // blocks)
    chosen = np.full(items, -1)
    top = np.sort(gain, axis=1)[:, ::-1]
    regret = top[:, 0] - top[:, min(1, blocks - 1)]
    for item in np.argsort(-regret, kind="stable"):
        block = int(np.where(room > 0, gain[item], -np.inf).argmax())
        chosen[item] = block
        room[block] -= 1
    return chosen
