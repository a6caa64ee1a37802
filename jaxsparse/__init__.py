"""Sparse and block-diagonal linear layers for JAX, Flax and, through `torch_bridge`, PyTorch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxsparse._backends import why_not
    from jaxsparse._devices import devices
    from jaxsparse._memory import keep_memory
    from jaxsparse._picture import plot_pattern
    from jaxsparse.costs.explaining import explain
    from jaxsparse.costs.measuring import measure
    from jaxsparse.formats import BlockPattern, NMPattern
    from jaxsparse.linen import BlockDiagDense, BlockSparseDense, SparseDense
    from jaxsparse.models.summary import summary
    from jaxsparse.nnx import BlockDiagLinear, BlockSparseLinear, SparseLinear
    from jaxsparse.ops import block_diag_matmul, sddmm, spmm
    from jaxsparse.training.roles import decay_mask

__version__ = "0.1.0"
__all__ = [
    "BlockDiagDense",
    "BlockDiagLinear",
    "BlockPattern",
    "BlockSparseDense",
    "BlockSparseLinear",
    "NMPattern",
    "SparseDense",
    "SparseLinear",
    "block_diag_matmul",
    "decay_mask",
    "devices",
    "explain",
    "keep_memory",
    "measure",
    "plot_pattern",
    "sddmm",
    "spmm",
    "summary",
    "why_not",
]

# Resolved at first use: torch's layers need no JAX, and the products no Flax.
_HOMES = {
    "decay_mask": "jaxsparse.training.roles",
    "devices": "jaxsparse._devices",
    "explain": "jaxsparse.costs.explaining",
    "keep_memory": "jaxsparse._memory",
    "measure": "jaxsparse.costs.measuring",
    "plot_pattern": "jaxsparse._picture",
    "summary": "jaxsparse.models.summary",
    "why_not": "jaxsparse._backends",
    **dict.fromkeys(("BlockPattern", "NMPattern"), "jaxsparse.formats"),
    **dict.fromkeys(("block_diag_matmul", "sddmm", "spmm"), "jaxsparse.ops"),
    **dict.fromkeys(("BlockDiagDense", "BlockSparseDense", "SparseDense"), "jaxsparse.linen"),
    **dict.fromkeys(("BlockDiagLinear", "BlockSparseLinear", "SparseLinear"), "jaxsparse.nnx"),
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
