"""Layers from torch's sparse tensors, and back."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxsparse import BlockPattern, NMPattern  # noqa: E402
from torch_bridge import BlockSparseLinear, SparseLinear  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype:UserWarning"),
]


def weight(out=24, size_in=40, block=(8, 4)):
    """A dense (out, in) weight with blocks of (out, in) `block` missing, and an output with none at all."""
    torch.manual_seed(0)
    kept = (torch.rand(out // block[0], size_in // block[1]) < 0.4).repeat_interleave(block[0], 0)
    w = torch.randn(out, size_in) * kept.repeat_interleave(block[1], 1)
    w[: block[0]] = 0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_csr_weight_becomes_a_layer_and_comes_back(dtype, bias):
    sparse = weight().to(dtype).to_sparse_csr()
    layer = SparseLinear.from_sparse(sparse, torch.arange(24, dtype=dtype) if bias else None)
    assert layer.weight.shape == (sparse.values().numel(),) and layer.weight.dtype == dtype
    x = torch.randn(5, 40, dtype=dtype)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight().to(dtype), layer.bias), atol=0.2)
    back = layer.to_sparse()
    assert back.layout == torch.sparse_csr and torch.equal(back.to_dense(), sparse.to_dense())


def test_a_bsr_weight_becomes_a_layer_and_comes_back():
    sparse = weight().to_sparse_bsr((8, 4))
    layer = BlockSparseLinear.from_sparse(sparse)
    assert layer.weight.shape == (sparse.values().shape[0], 4, 8) and layer.bias is None
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), x @ weight().T)
    back = layer.to_sparse()
    assert back.layout == torch.sparse_bsr and torch.equal(back.to_dense(), weight())


@pytest.mark.parametrize("block", [1, (8, 4)])
def test_a_transposed_pattern_is_written_in_torchs_order(block):
    pattern = BlockPattern.random(jax.random.key(0), (24, 40), density=0.4, block=block).T
    layer = BlockSparseLinear(40, 24, pattern=pattern)
    dense = np.asarray(pattern.to_dense(layer.weight.detach().numpy())).T
    np.testing.assert_array_equal(layer.to_sparse().to_dense().numpy(), dense)


def test_the_copy_shares_nothing():
    layer = SparseLinear.from_sparse(weight().to_sparse_csr())
    before = layer.to_sparse().to_dense()
    layer.to_sparse().values().zero_()
    assert torch.equal(layer.to_sparse().to_dense(), before)


def test_blocks_of_one_entry_are_entries():
    layer = SparseLinear.from_sparse(weight().to_sparse_bsr((1, 1)))
    assert layer.weight.shape == (weight().count_nonzero(),)
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), x @ weight().T)


FALLS = {
    "falls": (lambda ptr: ptr.index_put((torch.tensor(2),), torch.tensor(99)), "falls from 99 to"),
    "starts late": (lambda ptr: ptr.index_put((torch.tensor(0),), torch.tensor(-1)), "runs from -1 to"),
    "ends early": (lambda ptr: ptr.clamp(max=int(ptr.max()) - 1), "runs from 0 to"),
    "ends late": (lambda ptr: ptr + (ptr == ptr.max()), "runs from 0 to"),
}


@pytest.mark.parametrize("name", FALLS)
@pytest.mark.parametrize("block", [None, (8, 4)])
def test_row_pointers_that_are_none_are_refused(name, block):
    good = weight().to_sparse_bsr(block) if block else weight().to_sparse_csr()
    spoil, message = FALLS[name]
    make = torch.sparse_bsr_tensor if block else torch.sparse_csr_tensor
    parts = spoil(good.crow_indices()), good.col_indices(), good.values()
    bad = make(*parts, good.shape, check_invariants=False)
    with pytest.raises(ValueError, match=f"crow_indices of the torch.sparse_.sr weight .*{message}"):
        BlockSparseLinear.from_sparse(bad)


def test_columns_and_blocks_outside_of_the_matrix_are_refused():
    csr, bsr = weight().to_sparse_csr(), weight().to_sparse_bsr((8, 4))
    far = torch.sparse_csr_tensor(
        csr.crow_indices(), csr.col_indices() + 1000, csr.values(), csr.shape, check_invariants=False
    )
    with pytest.raises(ValueError, match="row index 10.. at position 0 is outside"):
        SparseLinear.from_sparse(far)
    ragged = (bsr.shape[0] - 1, bsr.shape[1])
    parts = bsr.crow_indices(), bsr.col_indices(), bsr.values()
    with pytest.raises(ValueError, match=r"blocks of 8 x 4 do not divide its shape"):
        BlockSparseLinear.from_sparse(torch.sparse_bsr_tensor(*parts, ragged, check_invariants=False))


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="strided tensor of 2 dimensions, and must be sparse_csr, sparse_bsr or another"
    ):
        SparseLinear.from_sparse(weight())
    with pytest.raises(ValueError, match="not single entries: use BlockSparseLinear"):
        SparseLinear.from_sparse(weight().to_sparse_bsr((8, 4)))
    with pytest.raises(ValueError, match=r"blocks of 16 x 16 do not divide \(40, 24\)"):
        BlockSparseLinear(40, 24, 0.5, 16).to_sparse()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["coo", "csc", "bsc"])
def test_every_other_layout_becomes_a_layer(layout, dtype):
    w = weight().to(dtype)
    sparse = getattr(w, f"to_sparse_{layout}")(*[(8, 4)] * (layout == "bsc"))
    layer = (BlockSparseLinear if layout == "bsc" else SparseLinear).from_sparse(sparse)
    assert layer.weight.numel() == w.count_nonzero() and torch.equal(layer.to_linear().weight, w)


def test_entries_that_a_coo_tensor_has_twice_are_summed():
    once = weight().to_sparse_coo()
    parts = once.indices().repeat(1, 2), once.values().repeat(2)
    twice = torch.sparse_coo_tensor(*parts, once.shape, check_invariants=True)
    layer = SparseLinear.from_sparse(twice)
    assert torch.equal(layer.to_linear().weight, 2 * weight())


WRONG = {
    "coo beyond": lambda: torch.sparse_coo_tensor(
        torch.tensor([[24], [0]]), torch.ones(1), (24, 40), check_invariants=False, is_coalesced=True
    ),
    "csc beyond": lambda: torch.sparse_csc_tensor(
        torch.tensor([0] + [1] * 40), torch.tensor([-1]), torch.ones(1), (24, 40), check_invariants=False
    ),
    "bsc beyond": lambda: torch.sparse_bsc_tensor(
        torch.tensor([0] + [1] * 10), torch.tensor([3]), torch.ones(1, 8, 4), (24, 40), check_invariants=False
    ),
    "csr beyond": lambda: torch.sparse_csr_tensor(
        torch.tensor([0] + [1] * 24), torch.tensor([2**40]), torch.ones(1), (24, 40), check_invariants=False
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_indices_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=r"(row|column) index -?\d+ at position \d+ is outside 0 to"):
        BlockSparseLinear.from_sparse(WRONG[name]())


def test_hybrids_and_batches_are_refused():
    with pytest.raises(ValueError, match="1 sparse dimension"):
        SparseLinear.from_sparse(weight().to_sparse(1))
    with pytest.raises(ValueError, match="3 dimensions"):
        SparseLinear.from_sparse(torch.stack([weight()] * 2).to_sparse())


# ---- two of four -------------------------------------------------------------------------------------------


def two_of_four(dtype, shape=(64, 128)):
    """A weight in which half of every group is stored, of float32 one of two."""
    torch.manual_seed(0)
    m = 2 if dtype == torch.float32 else 4
    w = torch.randn(shape).reshape(shape[0], -1, m)
    return w.masked_fill(w.abs().argsort(-1).argsort(-1) < m // 2, 0).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_semi_structured_weight_comes_and_goes(dtype):
    w = two_of_four(dtype)
    layer = SparseLinear.from_linear(torch.nn.Linear(128, 64, dtype=dtype), mask=w != 0)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(layer.pattern.gather(w.T.float().numpy()))))
    packed = layer.to_semi_structured()
    assert isinstance(packed, torch.sparse.SparseSemiStructuredTensor)
    torch.testing.assert_close(packed.to_dense(), w, atol=2e-4, rtol=0)  # torch loses low bits of float32 here
    again = SparseLinear.from_sparse(packed)
    assert again.weight.shape == (64 * 64,) and torch.equal(again.to_linear().weight, w)


def test_a_zero_that_is_stored_stays_stored():
    w = two_of_four(torch.float16)
    packed = SparseLinear.from_sparse(w.to_sparse_csr()).to_semi_structured()
    packed.packed[3] = 0
    layer = SparseLinear.from_sparse(packed)
    assert layer.weight.shape == (64 * 64,) and (layer.weight == 0).sum() == 64


@pytest.mark.parametrize("spoil", [lambda meta: meta * 0, lambda meta: meta * 0 + 0x1111, lambda meta: meta ^ 1])
def test_metadata_that_name_no_two_places_are_refused(spoil):
    packed = SparseLinear.from_sparse(two_of_four(torch.float16).to_sparse_csr()).to_semi_structured()
    packed.meta = spoil(packed.meta)
    with pytest.raises(ValueError, match="do not name 2 ascending places of every 4"):
        SparseLinear.from_sparse(packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_two_of_four_weight_reaches_n_m_pattern_and_comes_back_exactly(dtype):
    w = two_of_four(dtype)
    w[3, :8] = 0  # a group with fewer entries than it has places for
    n, m = (1, 2) if dtype == torch.float32 else (2, 4)
    pattern = NMPattern.from_dense(w.T.numpy(), n=n, m=m)
    values = pattern.gather(jax.numpy.asarray(w.T.numpy()))
    assert values.size == w.numel() // 2
    assert torch.equal(torch.from_numpy(np.array(pattern.to_dense(values))).T, w)
    layer = SparseLinear.from_sparse(SparseLinear.from_sparse(w.to_sparse_csr()).to_semi_structured())
    assert layer.weight.dtype == dtype
    same, moved = NMPattern.from_pattern(layer.pattern, layer.weight.detach().numpy(), n=n, m=m)
    np.testing.assert_array_equal(same.to_dense(moved), w.T)
    entries, stored = same.to_pattern(moved)
    back = SparseLinear(128, 64, pattern=entries, bias=False, dtype=dtype)
    with torch.no_grad():
        back.weight.copy_(torch.from_numpy(np.array(stored)))
    assert torch.equal(back.to_semi_structured().packed, layer.to_semi_structured().packed)


def test_a_layer_says_what_to_do_with_an_n_m_pattern():
    with pytest.raises(ValueError, match=r"a NMPattern, not a BlockPattern. Its to_pattern\(values\)"):
        SparseLinear(8, 12, pattern=NMPattern.random(jax.random.key(0), (8, 12), n=2, m=4))


def test_a_weight_that_is_not_two_of_four_is_not_packed():
    with pytest.raises(ValueError, match="at most 2 of 4 neighbouring inputs: .* groups have more"):
        SparseLinear(64, 32, 0.9, dtype=torch.float16).to_semi_structured()
    with pytest.raises(ValueError, match="no multiple"):
        SparseLinear(30, 32, 0.1, dtype=torch.float16).to_semi_structured()
