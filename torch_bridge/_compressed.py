"""Between torch's sparse tensors, (out, in) as weights are, and patterns with their values.

What torch calls the rows of a CSR or BSR weight are our output columns: both store the entries in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

from jaxsparse.files import layouts
from jaxsparse.formats import BlockPattern
from torch_bridge.dlpack import jax_to_torch


def split(w: Tensor) -> tuple[BlockPattern, Tensor]:
    """(pattern, values) of a sparse tensor of any of torch's layouts, or of a semi-structured one.

    Raises:
      ValueError: for another layout, more dimensions, or indices that are no matrix.
    """
    if isinstance(w, SparseSemiStructuredTensor):
        return _unpacked(w)
    pattern, values, order = layouts.place(w)
    values = values[torch.from_numpy(order).to(values.device)]
    return pattern, values.reshape(pattern.values_shape) if pattern.is_unstructured else values.mT


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


def pack(w: Tensor) -> SparseSemiStructuredTensor:
    """The semi-structured tensor of an (out, in) weight; on a CPU, where torch itself packs none, as CUTLASS has it.

    Raises:
      ValueError: where 4 neighbours of a row, of float32 2, have more than half not zero.
    """
    n, m = (1, 2) if w.dtype == torch.float32 else (2, 4)
    full = (w.reshape(len(w), -1, m) != 0).sum(-1) > n if w.shape[1] % m == 0 else None
    if full is None or full.any():
        count = "in_features is no multiple of it" if full is None else f"{int(full.sum())} groups have more"
        raise ValueError(
            f"a semi-structured {w.dtype} weight has at most {n} of {m} neighbouring inputs: {count}. Prune so first: "
            f"pruning.top_mask(scores, n_of_m=({n}, {m}))."
        )
    if w.is_cuda:
        return to_sparse_semi_structured(w)
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as compress

    packed, meta = compress(w)
    return _semi_structured(w.shape, packed, meta)


def _unpacked(w: SparseSemiStructuredTensor) -> tuple[BlockPattern, Tensor]:
    """What a semi-structured tensor stores, zeros among it too, where its metadata say."""
    packed, meta = w.packed, w.meta
    if not isinstance(w, SparseSemiStructuredTensorCUTLASS) or packed is None or meta is None or meta.ndim != 2:
        raise ValueError(
            f"the weight is a {type(w).__name__} in a layout that only the GPU reads: give "
            "weight.to_dense().to_sparse_csr() instead."
        )
    n, m = (1, 2) if packed.dtype == torch.float32 else (2, 4)
    ranks = torch.arange(1, n + 1, dtype=packed.dtype, device=packed.device).repeat(len(packed), packed.shape[1] // n)
    marks = _semi_structured(w.shape, ranks, meta).to_dense()
    groups = marks.reshape(-1, m)
    is_set = groups != 0
    if marks.shape != w.shape or (is_set.sum(-1) != n).any() or not torch.equal(groups[is_set], ranks.reshape(-1)):
        raise ValueError(f"the metadata of the semi-structured weight do not name {n} ascending places of every {m}.")
    at = (marks != 0).nonzero().T
    places = layouts.place(torch.sparse_coo_tensor(at, packed.reshape(-1), w.shape, check_invariants=True))
    return places.pattern, places.values[torch.from_numpy(places.order).to(packed.device)]


def _semi_structured(shape: torch.Size, packed: Tensor, meta: Tensor) -> SparseSemiStructuredTensor:
    make: Any = SparseSemiStructuredTensorCUTLASS  # whose __new__ has the arguments, of which a checker sees others
    return make(shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
