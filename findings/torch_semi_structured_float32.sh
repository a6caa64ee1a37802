#!/usr/bin/env bash
# torch 2.13.0, torch.sparse.SparseSemiStructuredTensorCUTLASS on a CPU.
#
# to_dense() of a semi-structured tensor should give back the numbers that are stored in it.
#
# Of float32 weights 1 in 64 comes back changed, by up to 2^-14 of its size; float16 and bfloat16 come back exactly.
# float32 is unpacked as pairs of halves, which scatter_ copies. Where the lower half of a number has the bits of a
# signaling NaN, the copy sets the bit that makes it a quiet one: scatter_ on halves does so on a CPU.
# Seen on 2026-11-27.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install -q torch==2.13.0 numpy
venv/bin/python - <<'PYTHON'
import sys
import warnings

import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

warnings.filterwarnings("ignore")  # semi-structured tensors call themselves a prototype
print("torch", torch.__version__)
torch.manual_seed(0)


def changed(dtype):
    """How many stored numbers come back as others, and by how much of their size."""
    weight, group = torch.randn(256, 256).to(dtype), 2 if dtype == torch.float32 else 4
    weight.view(256, -1, group)[..., group // 2 :] = 0  # half of every group is kept
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    rest = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
    dense = SparseSemiStructuredTensorCUTLASS(weight.shape, packed=packed, meta=meta, **rest).to_dense()
    wrong = dense != weight
    print(dtype, f"{int(wrong.sum())} of {packed.numel()} changed", end=", by up to ")
    print(float(((dense - weight).abs() / weight.abs())[wrong].max()) if wrong.any() else 0, "of their size")
    return int(wrong.sum())


count = changed(torch.float32)
exact = changed(torch.float16) + changed(torch.bfloat16)
one = torch.zeros(1, dtype=torch.float16).scatter_(0, torch.tensor([0]), torch.tensor([0x7C01]).short().view(torch.float16))
bits = int(one.view(torch.int16)) & 0xFFFF
print(f"scatter_ copies the half 0x7c01 as {bits:#x}")
sys.exit(not (count > 100 and exact == 0 and bits == 0x7E01))
PYTHON
