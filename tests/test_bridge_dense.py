"""Layers made from a torch.nn.Linear, and turned back into one."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import torch
from torch import nn

from jaxsparse.formats import BlockPattern
from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear


def linear(*shape, **options):
    torch.manual_seed(0)
    return nn.Linear(*shape, **options)


FULL = {
    "one block": lambda m: BlockDiagLinear.from_linear(m, 1),
    "density 1 of odd blocks": lambda m: BlockSparseLinear.from_linear(m, 1.0, block=(5, 7)),
    "density 1 of entries": lambda m: SparseLinear.from_linear(m, 1.0),
    "a transposed pattern": lambda m: BlockSparseLinear.from_linear(
        m, pattern=BlockPattern.random(jax.random.key(0), (20, 12), density=1, block=(8, 5)).T
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", FULL.values(), ids=FULL)
def test_a_full_layer_goes_there_and_back_bit_for_bit(make, dtype):
    dense = linear(12, 20, dtype=dtype)
    back = make(dense).to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == dtype
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert back.weight.data_ptr() != dense.weight.data_ptr()


@pytest.mark.parametrize("make", FULL.values(), ids=FULL)
def test_a_full_layer_computes_what_the_linear_does(make):
    dense, x = linear(12, 20), torch.randn(3, 12)
    torch.testing.assert_close(make(dense)(x), dense(x))


def test_the_blocks_of_largest_norm_are_kept():
    dense = linear(24, 40)
    got = BlockSparseLinear.from_linear(dense, 0.3, block=(4, 8)).to_linear().weight.detach().numpy().T
    w = dense.weight.detach().numpy().T.reshape(6, 4, 5, 8)
    norms = np.linalg.norm(w.astype(np.float64), axis=(1, 3))
    keep = norms >= np.sort(norms.ravel())[-9]  # 0.3 of 30 blocks
    np.testing.assert_array_equal(got, (w * keep[:, None, :, None]).reshape(24, 40))


def test_the_largest_entries_and_the_diagonal_are_kept():
    dense = linear(12, 20, bias=False)
    w = dense.weight.detach()
    entries = SparseLinear.from_linear(dense, 0.25).to_linear()
    keep = w.abs() >= w.abs().flatten().sort().values[-60]
    assert entries.bias is None and torch.equal(entries.weight, w * keep)
    diagonal = BlockDiagLinear.from_linear(dense, 4).to_linear().weight
    assert torch.equal(diagonal, w * torch.block_diag(*torch.ones(4, 5, 3)))


def test_a_mask_or_a_pattern_may_choose():
    dense = linear(12, 20)
    mask = torch.rand(20, 12) < 0.3
    pattern = BlockPattern.from_mask(mask.numpy().T)
    for layer in (SparseLinear.from_linear(dense, mask=mask), SparseLinear.from_linear(dense, pattern=pattern)):
        assert torch.equal(layer.to_linear().weight, dense.weight * mask)
    with pytest.raises(ValueError, match="exactly one of density, pattern and mask"):
        SparseLinear.from_linear(dense, 0.1, mask=mask)
    with pytest.raises(ValueError, match="use BlockSparseLinear"):
        SparseLinear.from_linear(dense, 0.5, block=4)


def test_rescaling_keeps_the_norm():
    dense = linear(24, 40)
    makers = [BlockSparseLinear.from_linear(dense, 0.3, block=8, rescale=True)]
    makers.append(BlockDiagLinear.from_linear(dense, 4, rescale=True))
    for layer in makers:
        torch.testing.assert_close(layer.weight.norm(), dense.weight.norm())
    nn.init.zeros_(dense.weight)
    assert not SparseLinear.from_linear(dense, 0.3, rescale=True).weight.any()


def test_mode_frozen_parameters_and_dtype_carry_over_both_ways():
    dense = linear(12, 20, dtype=torch.float16).eval()
    dense.weight.requires_grad_(False)
    layer = SparseLinear.from_linear(dense, 0.5, backend="xla")
    for m in (layer, layer.to_linear()):
        assert not m.training and not m.weight.requires_grad and m.bias.requires_grad
        assert m.weight.dtype == torch.float16
