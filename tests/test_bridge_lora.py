"""peft's adapters on sparse layers: trained, saved, loaded, and not merged."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch_bridge needs torch")
peft = pytest.importorskip("peft", reason="peft is not installed")

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, lora  # noqa: E402

NAMES = ["diag", "blocks", "entries", "dense"]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.diag = BlockDiagLinear(16, 32, 4)
        self.blocks = BlockSparseLinear(32, 24, density=0.5, block=8)
        self.entries = SparseLinear(24, 16, density=0.2)
        self.dense = torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.dense(self.entries(self.blocks(self.diag(x)).relu()))


def adapted(dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = Net().to(dtype)
    config = lora.register(peft.LoraConfig(target_modules=NAMES, r=4, **options))
    return copy.deepcopy(base), peft.get_peft_model(base, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_train_and_the_sparse_layers_stay(dtype):
    base, model = adapted(dtype)
    x = torch.randn(5, 16, dtype=dtype)
    assert torch.equal(model(x), base(x))  # B begins at zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    for name in NAMES:
        layer, old = getattr(model.base_model.model, name), getattr(base, name)
        assert torch.equal(layer.base_layer.weight, old.weight) and layer.base_layer.weight.grad is None
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert b.abs().max() > 0
        inputs = torch.randn(3, old.in_features, dtype=dtype)
        want = old(inputs) + layer.scaling["default"] * (inputs @ a.T.to(dtype) @ b.T.to(dtype))
        torch.testing.assert_close(layer(inputs), want, rtol=0.02, atol=0.02)


def test_adapters_are_saved_and_loaded(tmp_path):
    base, model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    config = lora.register(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config)
    x = torch.randn(5, 16)
    assert torch.equal(again(x), model(x))
    with again.disable_adapter():
        assert not torch.equal(again(x), model(x))
    assert torch.equal(again.unload()(x), adapted()[0](x))


def test_merging_is_refused_with_the_reason_and_changes_nothing():
    base, model = adapted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="BlockDiagLinear: A B is a dense matrix.*densify"):
            merge()
    assert torch.equal(model.base_model.model.diag.base_layer.weight, base.diag.weight)


def test_variants_that_need_a_dense_weight_are_refused():
    with pytest.raises(ValueError, match="SparseLora|use_dora|variant"):
        adapted(use_dora=True)
