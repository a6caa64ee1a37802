"""Dense layers of a Flax model replaced by sparse ones, picked by rules on their paths: NNX and Linen."""

from jaxsparse.models.surgery import (
    SparsifiedLinen,
    densify,
    densify_variables,
    keep_faster,
    sparsify,
    sparsify_linen,
    sparsify_variables,
)

__all__ = [
    "SparsifiedLinen",
    "densify",
    "densify_variables",
    "keep_faster",
    "sparsify",
    "sparsify_linen",
    "sparsify_variables",
]
