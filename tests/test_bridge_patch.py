"""Whole torch models patched by rules, and put back as they were."""

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from torch import nn
from torch.nn.utils import prune

from jaxsparse.costs import racing
from jaxsparse.costs.racing import Race
from torch_bridge import BlockDiagLinear, BlockSparseLinear, BlockSparseModelPatcher, SparseLinear, sparsify

RULES = [
    (r"body\.0", {"kind": "block_diag", "num_blocks": 4}),
    (r"body\.2", None),
    (r"body\.\d+", {"kind": "block_sparse", "density": 0.5, "block": 8}),
    ("head", {"kind": "sparse", "density": 0.2}),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


def net():
    torch.manual_seed(0)
    return Net()


def test_a_patched_model_computes_with_what_each_layer_kept():
    model, x = net(), torch.randn(3, 16)
    dense = copy.deepcopy(model)
    report = sparsify(model, RULES)
    kinds = [type(m) for m in (*model.body, model.head)]
    assert kinds == [BlockDiagLinear, nn.ReLU, nn.Linear, BlockSparseLinear, SparseLinear]
    assert [row.path for row in report] == ["body.0", "body.3", "head"]
    for row in report:
        old, new = dense.get_submodule(row.path), model.get_submodule(row.path)
        kept = new.to_linear().weight
        assert row.relative_error == pytest.approx(((kept - old.weight).norm() / old.weight.norm()).item(), rel=1e-5)
        assert 0 < row.relative_error < 1
        with torch.no_grad():
            old.weight.copy_(kept)
        assert row.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (old, new))
    torch.testing.assert_close(model(x), dense(x))
    assert report.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (dense, model))


def test_a_dry_run_reports_the_same_and_changes_nothing():
    model = net()
    modules, values = list(model.modules()), copy.deepcopy(model.state_dict())
    report = sparsify(model, RULES, dry_run=True)
    assert list(model.modules()) == modules
    assert all(torch.equal(values[name], t) for name, t in model.state_dict().items())
    report.revert()
    assert list(report) == list(sparsify(model, RULES)) and list(model.modules()) != modules


def test_revert_puts_the_very_layers_back():
    model = net()
    modules = list(model.modules())
    report = sparsify(model, RULES)
    report.revert()
    report.revert()
    assert list(model.modules()) == modules


def test_what_does_not_fit_is_named_and_nothing_changes():
    model = net()
    modules = list(model.modules())
    with pytest.raises(ValueError, match="head: out_features=5 is not a whole number"):
        sparsify(model, [(".*", {"kind": "block_diag", "num_blocks": 2})])
    with pytest.raises(ValueError, match=r"'body\.1', a ReLU"):
        sparsify(model, [*RULES, (r"body\.1", {"kind": "sparse", "density": 0.5})])
    with pytest.raises(ValueError, match="convert it with from_linear"):
        sparsify(nn.Linear(4, 4), [(".*", {"kind": "sparse", "density": 0.5})])
    assert list(model.modules()) == modules


def test_a_layer_in_two_places_stays_one():
    model = net()
    model.again = model.once_more = model.body[2]
    rule = (".*2", {"kind": "sparse", "density": 0.5})
    report = sparsify(model, [rule])
    assert model.again is model.once_more is model.body[2] and isinstance(model.again, SparseLinear)
    assert len(report) == 1
    report.revert()
    assert model.again is model.once_more is model.body[2] and type(model.again) is nn.Linear


def test_a_weight_that_others_use_is_not_parted_from_them():
    model = net()
    model.embedding = nn.Embedding(5, 16)
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"head shares its weight with embedding.*\('head', None\)"):
        sparsify(model, RULES)
    sparsify(model, [("head", None), *RULES[:3]])
    model = net()
    model.body[3].bias = model.body[0].bias
    with pytest.raises(ValueError, match=r"shares its bias with body\.3"):
        sparsify(model, RULES)


def test_a_layer_with_hooks_is_not_replaced():
    model = net()
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="head has hooks"):
        sparsify(model, RULES)


def test_rescaled_layers_keep_their_norm():
    model = net()
    norm = model.body[3].weight.norm()
    sparsify(model, RULES, rescale=True)
    torch.testing.assert_close(model.body[3].weight.norm(), norm)


def test_fresh_layers_are_drawn_from_torchs_generator():
    weights = []
    for seed in (1, 1, 2):
        model = net().eval()
        torch.manual_seed(seed)
        report = sparsify(model, RULES, fresh=True)
        assert [row.relative_error for row in report] == [None] * 3 and not model.head.training
        weights.append(model.head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_model_patched_by_the_same_rules_loads_the_state():
    model, other, x = net(), Net(), torch.randn(3, 16)
    for m in (model, other):
        sparsify(m, RULES)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_training_follows_the_masked_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    sparsify(model, [("0", {"kind": "block_sparse", "density": 0.5, "block": 8})])
    dense = nn.Sequential(model[0].to_linear(), nn.Tanh(), copy.deepcopy(model[2]))
    mask = dense[0].weight.detach() != 0
    dense[0].weight.register_hook(lambda g: g * mask)
    for m in (model, dense):
        optimizer = torch.optim.AdamW(m.parameters(), 0.01, weight_decay=0)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            (m(torch.randn(8, 16)) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model[0].to_linear().weight, dense[0].weight, atol=1e-5, rtol=1e-4)


def test_only_what_is_faster_is_replaced(monkeypatch):
    rounds = iter([Race((2.0, 1.0), 9, 9), Race((1.0, 2.0), 0, 9), Race((1.0, 1.0), 5, 9)])
    stepped = []
    monkeypatch.setattr(racing, "race", lambda steps: [step() for step in steps] and stepped.append(1) or next(rounds))
    model = net()
    report = sparsify(model, RULES, only_if_faster=True, batch=8)
    assert [row.kind for row in report] == ["block_diag", "dense", "dense"] and len(stepped) == 3
    assert [row.milliseconds for row in report] == [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)]
    assert type(model.body[0]) is BlockDiagLinear and type(model.head) is nn.Linear
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="give batch"):
        sparsify(net(), RULES, only_if_faster=True)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_torchs_own_transformer_runs_in_eval_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model, x, mask = nn.TransformerEncoder(layer, 2), torch.randn(2, 4, 32), torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 3:] = True
    options = {"src_key_padding_mask": mask}
    with torch.no_grad():
        before = model.eval()(x, **options)
    report = sparsify(model, [(r".*linear\d", {"kind": "block_sparse", "density": 1, "block": 16})])
    with torch.no_grad():
        after = model(x, **options)
        torch.testing.assert_close(after[:, :3], before[:, :3])
        report.revert()
        assert torch.equal(model(x, **options), before)


def test_the_patcher_speaks_the_words_of_pytorch_block_sparse():
    model, patcher = net(), BlockSparseModelPatcher()
    found = patcher.get_patchable_layers(model)
    assert [layer["regexp"] for layer in found] == [r"body\.0", r"body\.2", r"body\.3", "head"]
    assert found[3]["layer"] is model.head
    patcher.add_pattern(r"body\.[0-9]+", {"density": 0.5, "block": 16})
    with pytest.raises(ValueError, match="needs 'density'"):
        patcher.add_pattern("head", {})
    report = patcher.patch_model(model)
    assert [row.kind for row in report] == ["block_sparse"] * 3 and model.body[0].density == 0.5
    report.revert()


@pytest.mark.slow  # 84 million parameters
def test_roberta_keeps_67_6_of_its_83_5_million_parameters():
    transformers = pytest.importorskip("transformers", reason="transformers, which has RoBERTa, is not installed")
    config = transformers.RobertaConfig(
        vocab_size=52000,
        max_position_embeddings=514,
        num_attention_heads=12,
        num_hidden_layers=6,
        type_vocab_size=1,
    )
    model, patcher = transformers.RobertaForMaskedLM(config), BlockSparseModelPatcher()
    assert model.num_parameters() == 83_504_416
    for name in ("intermediate", "output", r"attention\.output"):
        patcher.add_pattern(rf"roberta\.encoder\.layer\.[0-9]+\.{name}\.dense", {"density": 0.5})
    report = patcher.patch_model(model)
    assert len(report) == 18 and report.parameters[1] == model.num_parameters() == 67_579_168
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 261, (2, 16)))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    dense = model.roberta.encoder.layer[0].intermediate.dense
    assert dense.weight.grad.shape == (24 * 96 // 2, 32, 32) and dense.weight.grad.abs().sum() > 0


# ---- what is left, and what is taken beside torch.nn.Linear -----------------------------------------------

SPARSE = {"kind": "sparse", "density": 0.5}


class Plain(nn.Linear):
    """Computes what its base class does."""


class Double(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Module):
    def __init__(self, size_in, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, size_in))

    def forward(self, x):
        return x @ self.weight.T


def odd():
    model = nn.ModuleDict({kind.__name__: kind(8, 6) for kind in (nn.Linear, Plain, Double, Own, nn.Embedding)})
    model["lazy"] = nn.LazyLinear(6)
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    model["attention"] = nn.MultiheadAttention(8, 2)
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_look_dense_are_left_with_a_reason():
    model = odd()
    report = sparsify(model, [(".*", SPARSE)])
    assert [row.path for row in report] == ["Linear"]
    reasons = {one.path: one.reason for one in report.left}
    for path, reason in {
        "Plain": r"a subclass of torch.nn.Linear: where its owner only calls it, give also=(Plain,).",
        "Double": "is a Double with a forward pass of its own",
        "Own": "is a Own, and no torch.nn.Linear or Conv1D",
        "lazy": "is a LazyLinear that has no weight yet: call the model once",
        "normed": "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
        "attention.out_proj": "torch.nn.MultiheadAttention reads its weight and does not call it",
    }.items():
        assert reason in reasons.pop(path)
        assert reason in str(report)
    assert not reasons
    with pytest.raises(ValueError, match="'Double' is a Double with a forward pass of its own"):
        sparsify(model, [("Double", SPARSE)])


def test_subclasses_are_taken_where_the_caller_names_them():
    model, x = odd(), torch.randn(3, 8)
    before = model["Plain"](x)
    report = sparsify(model, [(".*", {"kind": "sparse", "density": 1})], also=(Plain, nn.Linear))
    assert [row.path for row in report] == ["Linear", "Plain"]
    torch.testing.assert_close(model["Plain"](x), before)
    report.revert()
    assert type(model["Plain"]) is Plain
    out_proj = type(model["attention"].out_proj)
    report = sparsify(model, [(".*", SPARSE)], also=(out_proj,))  # its owner still reads its weight
    assert "attention.out_proj" in [one.path for one in report.left]
    for kind in (Double, Own):
        with pytest.raises(
            ValueError, match=rf"also={kind.__name__} is no subclass of torch.nn.Linear with the forward"
        ):
            sparsify(model, [(".*", SPARSE)], also=(kind,))


@pytest.mark.parametrize(
    "settle, call",
    [
        (nn.utils.spectral_norm, r"torch.nn.utils.remove_spectral_norm\(layer, 'weight'\)"),
    ],
)
def test_a_weight_that_a_hook_computes_is_to_be_made_a_parameter_first(settle, call):
    model = net()
    settle(model.head)
    with pytest.raises(ValueError, match=f"head has a weight that a hook computes. Make it a parameter first: {call}"):
        sparsify(model, RULES)


def prune_globally(m):
    prune.global_unstructured([(m.body[0], "weight"), (m.head, "weight")], prune.L1Unstructured, amount=0.8)


def prune_and_train(m):
    """Values change after the last forward pass, and one that is kept becomes zero."""
    prune.l1_unstructured(m.head, "weight", 0.9)
    with torch.no_grad():
        m.head.weight_orig.mul_(2)
        m.head.weight_orig.view(-1)[m.head.weight_mask.view(-1).argmax()] = 0


PRUNED = {
    "unstructured": lambda m: prune.l1_unstructured(m.head, "weight", 0.9),
    "at random": lambda m: prune.random_unstructured(m.head, "weight", 0.5),
    "by rows": lambda m: prune.ln_structured(m.head, "weight", 0.5, n=2, dim=0),
    "by columns, twice": lambda m: (prune.ln_structured(m.head, "weight", 3, n=2, dim=1), PRUNED["unstructured"](m)),
    "globally": prune_globally,
    "by a mask of one's own": lambda m: prune.custom_from_mask(m.head, "weight", torch.eye(5, 16)),
    "trained since": prune_and_train,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("how", PRUNED)
def test_layers_that_torch_pruned_become_sparse_with_exactly_what_was_kept(how, removed, dtype):
    model, x = net().to(dtype), torch.randn(3, 16, dtype=dtype)
    PRUNED[how](model)
    kept = int(model.head.weight_mask.sum())
    if removed and how != "trained since":
        for layer in (m for m in model.modules() if hasattr(m, "weight_mask")):
            prune.remove(layer, "weight")
    head = model.head
    want = head.weight.detach().clone() if removed and how != "trained since" else head.weight_orig * head.weight_mask
    report = sparsify(model, [(".*", {"kind": "sparse", "keep": "nonzero"})])
    assert {row.path for row in report} == ({"head", "body.0"} if how == "globally" else {"head"})
    assert {one.path for one in report.left} == {"body.0", "body.2", "body.3"} - {row.path for row in report}
    assert type(model.head) is SparseLinear and model.head.weight.numel() == kept and report[-1].relative_error == 0
    assert torch.equal(model.head.to_linear().weight, want)
    torch.testing.assert_close(model.head(x), nn.functional.linear(x, want))
    model(x).sum().backward()
    assert model.head.weight.grad is not None


def test_pruned_rows_of_blocks_become_blocks():
    model = nn.Sequential(nn.Linear(64, 64))
    prune.ln_structured(model[0], "weight", 32, n=2, dim=1)
    columns = model[0].weight_mask[0] != 0
    with torch.no_grad():
        model[0].weight_orig[:, :] = model[0].weight_orig[:, torch.argsort(~columns, stable=True)]
        model[0].weight_mask[:, :] = torch.arange(64) < 32
    want = model[0].weight_orig.detach() * model[0].weight_mask
    report = sparsify(model, [("0", {"kind": "block_sparse", "keep": "nonzero"})])
    assert report[0].after == "block_sparse, 0.5 of 32x32" and model[0].weight.shape == (2, 32, 32)
    assert torch.equal(model[0].to_linear().weight, want)


def test_a_layer_with_a_hook_beside_its_pruning_is_not_replaced():
    model = net()
    prune.l1_unstructured(model.head, "weight", 0.9)
    model.head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="head has hooks"):
        sparsify(model, [("head", {"kind": "sparse", "keep": "nonzero"})])
    with pytest.raises(ValueError, match="fresh layers draw it"):
        sparsify(net(), [("head", {"kind": "sparse", "keep": "nonzero"})], fresh=True)


def test_conv1d_of_transformers_is_replaced_as_a_linear_layer():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers, which has Conv1D, is not installed")
    torch.manual_seed(0)
    model, x = nn.Sequential(utils.Conv1D(12, 8), nn.ReLU(), utils.Conv1D(4, 12)), torch.randn(3, 8)
    before = model(x)
    report = sparsify(model, [("0", {"kind": "block_diag", "num_blocks": 1}), ("2", {"kind": "sparse", "density": 1})])
    torch.testing.assert_close(model(x), before)
    assert [(row.before, row.relative_error) for row in report] == [("8x12", 0), ("12x4", 0)] and not report.left
    report.revert()
    assert torch.equal(model(x), before)
    report = sparsify(model, [(".*", {"kind": "sparse", "density": 0.5})], only_if_faster=True, batch=8)
    fresh = sparsify(nn.Sequential(utils.Conv1D(12, 8)), [("0", SPARSE)], fresh=True)
    assert len(report) == 2 and fresh[0].parameters == (108, 60)
