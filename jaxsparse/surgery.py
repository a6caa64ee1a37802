"""Dense layers of a Flax model replaced by sparse ones, picked by rules on their paths: NNX and Linen."""

from jaxsparse.models._densify import densify, densify_variables
from jaxsparse.models.in_linen import SparsifiedLinen, keep_faster, sparsify_linen, sparsify_variables
from jaxsparse.models.in_nnx import sparsify

__all__ = [
    "SparsifiedLinen",
    "densify",
    "densify_variables",
    "keep_faster",
    "sparsify",
    "sparsify_linen",
    "sparsify_variables",
]
