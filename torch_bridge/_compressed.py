"""Between torch's compressed sparse tensors, (out, in) as weights are, and patterns with their values.

What torch calls the rows of a CSR or BSR weight are our output columns: both store the entries in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jaxsparse._indices import lines_of
from jaxsparse.formats import BlockPattern
from torch_bridge.dlpack import jax_to_torch


def split(w: Tensor) -> tuple[BlockPattern, Tensor]:
    """(pattern, values) of a CSR tensor, or a BSR one, whose blocks are stored transposed.

    Raises:
      ValueError: for another layout, more dimensions, or indices that are no matrix.
    """
    if w.layout not in (torch.sparse_csr, torch.sparse_bsr) or w.ndim != 2:
        raise ValueError(
            f"the weight is a {w.layout} tensor of {w.ndim} dimensions, and must be sparse_csr or sparse_bsr of two. "
            "Use weight.to_sparse_csr() or weight.to_sparse_bsr(block)."
        )
    values, (out, size_in) = w.values().detach(), w.shape
    ptr, rows = (index.cpu().numpy() for index in (w.crow_indices(), w.col_indices()))
    block = (1, 1) if values.ndim == 1 else (values.shape[2], values.shape[1])
    if 0 in block or size_in % block[0] or out % block[1]:
        raise ValueError(
            f"the sparse_bsr weight has values of shape {tuple(values.shape)}: blocks of {block[1]} x {block[0]} do "
            f"not divide its shape {(out, size_in)}."
        )
    cols = lines_of(ptr, out // block[1], rows, values, f"crow_indices of the {w.layout} weight")
    pattern = BlockPattern.from_indices(rows, cols, shape=(size_in, out), block=block)
    return pattern, values.reshape(pattern.values_shape) if block == (1, 1) else values.mT


def join(pattern: BlockPattern, values: Tensor) -> Tensor:
    """The CSR tensor of single entries, or the BSR tensor of blocks.

    Raises:
      ValueError: if the blocks do not divide the matrix, which BSR can't store.
    """
    (size_in, out), (i, o) = pattern.shape, pattern.block
    if size_in % i or out % o:
        raise ValueError(
            f"blocks of {i} x {o} do not divide ({size_in}, {out}), as BSR tensors need. Use "
            "layer.to_linear().weight.to_sparse_csr()."
        )
    if pattern.transposed:  # stored by input: the other view of the index is in torch's order
        stored = pattern.T
        ptr, index = stored.row_ptr, stored.col_index
        values = values[jax_to_torch(stored.order).to(values.device)]
    else:
        ptr, index = pattern.col_ptr, pattern.row_index
        values = values if values.ndim == 1 else values.mT
    ptr, index = (jax_to_torch(a).to(values.device) for a in (ptr, index))
    make = torch.sparse_csr_tensor if values.ndim == 1 else torch.sparse_bsr_tensor
    return make(ptr, index, values.contiguous(), (out, size_in), check_invariants=True)
