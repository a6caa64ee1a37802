"""Parameter groups by role: the weights of sparse layers decay whatever their rank, biases and norms do not."""

import copy

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import torch

from torch_bridge import BlockDiagLinear, BlockSparseLinear, SparseLinear, from_flax, parameter_groups


def names_of(model, **options):
    decayed, others = parameter_groups(model, weight_decay=0.1, **options)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    name = {id(p): path for path, p in model.named_parameters()}
    return tuple({name[id(p)] for p in group["params"]} for group in (decayed, others))


def model():
    return torch.nn.Sequential(
        torch.nn.Embedding(5, 8),
        SparseLinear(8, 8, 0.5),
        BlockSparseLinear(8, 8, 0.5, block=4),
        BlockDiagLinear(8, 8, 2),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 8),
    )


def test_weights_decay_whatever_their_rank():
    decayed, others = names_of(model())
    assert decayed == {f"{k}.weight" for k in (0, 1, 2, 3, 5)}
    assert others == {f"{k}.bias" for k in (1, 2, 3, 4, 5)} | {"4.weight"}


def test_an_optimizer_decays_the_weight_of_single_entries_and_not_its_bias():
    layer = SparseLinear(8, 8, 0.5)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(layer, weight_decay=0.5), lr=0.5)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 0.75 * before["weight"])
    assert torch.equal(layer.bias, before["bias"])


class Twice(torch.nn.Module):
    def forward(self, w):
        return 2 * w


def test_parametrized_and_pruned_weights_decay_too():
    layer = SparseLinear(8, 8, pattern=SparseLinear(8, 8, 1 / 8).pattern)  # as many values as biases
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    assert names_of(layer)[0] == {"parametrizations.weight.original"}
    pruned = torch.nn.utils.prune.l1_unstructured(SparseLinear(8, 8, 0.5), "weight", 0.25)
    assert names_of(pruned) == ({"weight_orig"}, {"bias"})


def test_shared_parameters_stand_once_and_frozen_ones_not_at_all():
    layers = torch.nn.Sequential(SparseLinear(8, 8, 0.5), SparseLinear(8, 8, 0.5), torch.nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    layers[2].requires_grad_(False)
    assert names_of(layers) == ({"0.weight"}, {"0.bias", "1.bias"})
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(layers.requires_grad_(False), weight_decay=0.1)


def test_kernels_of_flax_models_decay():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    import jaxsparse

    rngs = nnx.Rngs(0)
    flax_model = nnx.Sequential(jaxsparse.SparseLinear(8, 8, density=0.5, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))
    decayed, others = names_of(from_flax(flax_model))
    assert decayed == {"layers.0.kernel"}
    assert others == {"layers.0.bias", "layers.1.bias", "layers.1.scale"}
