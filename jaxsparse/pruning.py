"""What to prune, how much of each layer, and when: scores, densities, schedules, and masks on dense weights.

A density is always the fraction that is kept. Nothing here is sparse yet: masks and scores are of dense matrices, and
`BlockPattern.from_dense(w, density=..., score=score(...))` makes a sparse weight of one.
"""

from jaxsparse.training.pruning import (
    Schedule,
    budget,
    cyclic,
    erk,
    one_shot,
    polynomial,
    prune_updates,
    score,
    top_k,
    top_mask,
    uniform,
)

__all__ = [
    "Schedule",
    "budget",
    "cyclic",
    "erk",
    "one_shot",
    "polynomial",
    "prune_updates",
    "score",
    "top_k",
    "top_mask",
    "uniform",
]
