"""Layers made from dense ones whose weight is computed, stale, frozen, quantized, lazy or not there."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear

MAKERS = {
    "diagonal": lambda m: BlockDiagLinear.from_linear(m, 1),
    "blocks": lambda m: BlockSparseLinear.from_linear(m, 1.0, block=(4, 2)),
    "entries": lambda m: SparseLinear.from_linear(m, 1.0),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def chained(m):
    prune.l1_unstructured(m, "weight", 0.3)
    prune.random_unstructured(m, "weight", 0.3)


def weight_of_weight_norm_pruned(m):
    torch.nn.utils.weight_norm(m)
    hooks = m._forward_pre_hooks
    prune.l1_unstructured(m, "weight_v", 0.3)
    hooks.move_to_end(next(iter(hooks)))  # weight_v first: what is computed from it comes after


COMPUTED = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned by rows": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "pruned by a mask": lambda m: prune.custom_from_mask(m, "weight", torch.rand_like(m.weight) < 0.5),
    "pruned twice": chained,
    "a pruned bias": lambda m: prune.random_unstructured(m, "bias", 0.5),
    "the older weight_norm": torch.nn.utils.weight_norm,
    "weight_norm, pruned": weight_of_weight_norm_pruned,
    "the older spectral_norm": torch.nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m).eval(),
}
OLD = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")


def trained_since_its_last_forward(settle, module):
    """A module whose attribute `weight`, if it has one that is computed, is that of before the last step."""
    settle(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    module(torch.randn(5, module.in_features)).square().sum().backward()
    with torch.no_grad():
        module(torch.randn(1, module.in_features))
    optimizer.step()
    return module


def assert_computes_and_trains(layer, dense):
    x = torch.randn(3, dense.in_features)
    got = layer(x)
    torch.testing.assert_close(got, dense.eval()(x))
    assert layer.weight.requires_grad and layer.bias.requires_grad
    assert layer.weight.is_leaf and isinstance(layer.weight, nn.Parameter)


@OLD
@EVERY
@pytest.mark.parametrize("settle", COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_taken_as_the_next_forward_pass_has_it(settle, make):
    torch.manual_seed(0)
    dense = trained_since_its_last_forward(settle, nn.Linear(8, 6))
    assert_computes_and_trains(make(dense), dense)
    with torch.inference_mode():
        assert make(dense).weight.requires_grad


@OLD
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize("name", ["pruned", "a pruned bias", "the older weight_norm", "weight_norm"])
@EVERY
def test_a_sparse_layer_with_a_computed_weight_turns_dense_as_it_computes_now(make, name):
    torch.manual_seed(0)
    layer = trained_since_its_last_forward(COMPUTED[name], make(nn.Linear(8, 6)))
    dense, x = layer.to_linear(), torch.randn(3, 8)
    with torch.no_grad():  # before the layer's own forward pass, which brings its weight up to date
        got = dense(x)
    torch.testing.assert_close(got, layer(x))
    assert dense.weight.requires_grad and dense.bias.requires_grad
    if isinstance(layer, BlockSparseLinear):
        torch.testing.assert_close(layer.to_sparse().to_dense(), dense.weight.detach())


def test_what_trains_is_asked_of_what_the_weight_is_made_from():
    dense = parametrizations.weight_norm(nn.Linear(8, 6))
    dense.parametrizations.weight.requires_grad_(False)
    with torch.no_grad():
        assert not SparseLinear.from_linear(dense, 1.0).weight.requires_grad
        dense.parametrizations.weight.requires_grad_(True)
        assert SparseLinear.from_linear(dense, 1.0).weight.requires_grad


def test_taking_a_weight_leaves_the_older_spectral_norm_as_it_is():
    dense = torch.nn.utils.spectral_norm(nn.Linear(8, 6))
    u = dense.weight_u.clone()
    SparseLinear.from_linear(dense, 1.0)
    assert torch.equal(dense.weight_u, u)


def replaced(**attributes):
    m = nn.Linear(8, 6)
    for name, value in attributes.items():
        m._parameters.pop(name, None)
        setattr(m, name, value)
    return m


class Double(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_a_forward_of_its_own():
    m = nn.Linear(8, 6)
    m.forward = lambda x: 2 * nn.functional.linear(x, m.weight, m.bias)
    return m


def dtensor():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return nn.Linear(8, 6)


REFUSED = {
    "a weight that something computes": (
        lambda: replaced(weight=torch.randn(6, 8)),
        "is no parameter: something unknown",
    ),
    "a lazy layer": (lambda: nn.LazyLinear(6), "has no weight yet: call it once"),
    "integers": (
        lambda: replaced(weight=nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)),
        "weight of this Linear is torch.int8",
    ),
    "complex numbers": (
        lambda: nn.Linear(8, 6, dtype=torch.complex64),
        "is torch.complex64, and sparse layers compute in",
    ),
    "a sparse weight": (
        lambda: replaced(weight=nn.Parameter(torch.randn(6, 8).to_sparse())),
        "layout torch.sparse_coo: make it dense",
    ),
    "a subclass": (dtensor, "is a FakeTensor, which says itself|is a Parameter, which says itself"),
    "two dtypes": (lambda: replaced(bias=nn.Parameter(torch.zeros(6).half())), "float32 and the bias torch.float16"),
    "a class of its own": (lambda: Double(8, 6), "is a Double with a forward pass of its own"),
    "a forward pass of its own": (with_a_forward_of_its_own, "is a Linear with a forward pass of its own"),
    "another layer": (lambda: nn.Conv1d(8, 6, 1), "is a Conv1d, and no torch.nn.Linear"),
}


@EVERY
@pytest.mark.parametrize("dense, why", REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_weight_that_is_not_known_is_refused_with_the_reason(dense, why, make):
    with pytest.raises((ValueError, TypeError), match=why):
        make(dense())


def test_a_layer_on_the_meta_device_has_nothing_to_choose_from():
    dense = nn.Linear(8, 6, device="meta")
    for options in ({"density": 0.5}, {"mask": torch.ones(6, 8)}):
        with pytest.raises(ValueError, match="on the meta device and has no values"):
            SparseLinear.from_linear(dense, **options)
    assert BlockDiagLinear.from_linear(dense, 2).weight.is_meta


def test_conv1d_of_transformers_is_a_linear_layer():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers, which has Conv1D, is not installed")
    torch.manual_seed(0)
    dense, x = utils.Conv1D(6, 8), torch.randn(3, 8)
    for make in MAKERS.values():
        layer = make(dense)
        torch.testing.assert_close(layer(x), dense(x))
        torch.testing.assert_close(layer.to_linear()(x), dense(x))
