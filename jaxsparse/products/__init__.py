"""The bilinear products as JAX primitives: each with its derivatives, its batching, how it shards and where it runs.

Operands are taken as they are; `jaxsparse.ops` checks them.
"""

from jaxsparse.products.block_diag import block_diag_matmul
from jaxsparse.products.sparse import sddmm, spmm

__all__ = ["block_diag_matmul", "sddmm", "spmm"]
