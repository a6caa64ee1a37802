"""`summary` counts the layers of a model: parameters, bytes and operations, in each framework."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxsparse
from jaxsparse.models import summary as summaries

X = jax.ShapeDtypeStruct((2, 32), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(10, 64, rngs=rngs)
        self.entries = jaxsparse.SparseLinear(64, 128, density=0.25, rngs=rngs)
        self.blocks = jaxsparse.BlockSparseLinear(128, 100, density=0.5, block=(32, 16), rngs=rngs)
        self.diagonal = jaxsparse.BlockDiagLinear(128, 64, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.convolution = nnx.Conv(4, 8, (3,), rngs=rngs)
        self.dense = nnx.List([nnx.Linear(64, 8, use_bias=False, rngs=rngs)])
        self.again = self.entries


def by_path(summed):
    return {row.path: row for row in summed}


def test_nnx_layers_are_counted_once_each_with_what_they_store():
    model = Net(nnx.Rngs(0))
    summed = jaxsparse.summary(model)
    rows = by_path(summed)
    assert list(rows) == ["again", "blocks", "convolution", "dense.0", "diagonal", "norm", "table"]
    entries, blocks, diagonal = rows["again"], rows["blocks"], rows["diagonal"]
    assert entries[1:6] == ("SparseLinear", (64, 128), (1, 1), 0.25, 2048 + 128) and entries.flops == 2 * 2048
    assert entries.bytes == 4 * (2048 + 128) + 4 * (3 * 2048 + 129 + 65)
    assert blocks.shape == (128, 100) and blocks.block == (32, 16) and blocks.flops == 2 * 14 * 32 * 16
    assert diagonal.shape == (128, 64) and diagonal.block == (32, 16) and diagonal.density == 0.25
    assert rows["dense.0"].flops == 2 * 64 * 8 and rows["table"].flops == rows["norm"].flops == 0
    assert rows["convolution"].flops is None and summed.share(rows["convolution"]) is None
    assert summed.parameters == sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert sum(summed.share(row) or 0 for row in summed) == pytest.approx(1)


@pytest.mark.parametrize("inputs", [(), (X,)], ids=["guessed", "called"])
def test_linen_layers_are_known_by_their_parameters_or_by_a_call(inputs):
    layers = [nn.Dense(64), nn.LayerNorm(), jaxsparse.BlockDiagDense(128, 4), jaxsparse.SparseDense(64, density=0.25)]
    model = nn.Sequential([*layers, jaxsparse.BlockSparseDense(32, density=0.5, block=16, use_bias=False)])
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    rows = by_path(jaxsparse.summary(model, variables, *inputs))
    kinds = ["Dense", "LayerNorm" if inputs else "norm", "BlockDiagDense", "SparseDense", "BlockSparseDense"]
    assert [row.kind for row in rows.values()] == kinds
    assert [row.shape for row in rows.values()] == [(32, 64), (64,), (64, 128), (128, 64), (64, 32)]
    of_a_row = [2 * 32 * 64, 0, 2 * 64 * 32, 2 * 2048, 2 * 64 * 16]
    assert [row.flops for row in rows.values()] == [(2 if inputs else 1) * flops for flops in of_a_row]
    assert rows["layers_4"].parameters == 64 * 16 and rows["layers_3"].density == 0.25


def test_torch_layers_are_counted_under_pruning_and_parametrizations():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch.nn.utils import prune

    import torch_bridge

    linear, normed = torch.nn.Linear(64, 32), torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 4))
    prune.l1_unstructured(linear, "weight", 0.75)
    model = torch.nn.ModuleList(
        [
            torch_bridge.SparseLinear(64, 32, density=0.25),
            torch_bridge.BlockSparseLinear(64, 30, 0.5, block=(16, 8), bias=False),
            torch_bridge.BlockDiagLinear(64, 32, 4),
            linear,
            normed,
            torch.nn.Embedding(10, 64),
            torch.nn.Conv1d(3, 4, 5),
        ]
    )
    model.append(model[0])
    summed = jaxsparse.summary(model)
    rows = list(summed)
    assert [row.path for row in rows] == list("0123456")
    assert [row.density for row in rows] == [0.25, 0.5, 0.25, 0.25, 1, 1, 1]
    assert [row.block for row in rows[:4]] == [(1, 1), (16, 8), (16, 8), None]
    assert [row.flops for row in rows] == [2 * 512, 2 * 8 * 128, 2 * 512, 2 * 2048, 2 * 32, 0, None]
    assert rows[4].parameters == 32 + 4 + 4 and rows[1].shape == (64, 30)
    assert summed.parameters == sum(p.numel() for p in model.parameters())


# ---- FLOPs of a call ---------------------------------------------------------------------------------------------

IMAGE = 2 * 12 * 12 * (3 * 3 * 3) * 16  # FLOPs for an image: positions of the output, and what each multiplies
LATER = 2 * 12 * 12 * 16 * (2 * 2) * 4  # a transposed convolution: positions of the input


def test_of_a_call_in_nnx_convolutions_count_too_and_the_model_stays_as_it_is():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 16, (3, 3), padding="SAME", rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.later = nnx.ConvTranspose(16, 4, (2, 2), strides=2, padding="VALID", rngs=rngs)
            self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
            self.unused = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.heads(self.later(self.drop(self.norm(self.first(x)))))

    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    rows = by_path(jaxsparse.summary(model, jax.ShapeDtypeStruct((5, 12, 12, 3), jnp.float32)))
    flops = {path: row.flops for path, row in rows.items()}
    assert flops == {"first": 5 * IMAGE, "later": 5 * LATER, "heads": 5 * 2 * 24 * 24 * 24, "norm": 0, "unused": 0}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))))
    assert type(model.first) is nnx.Conv


def test_of_a_call_in_linen_convolutions_count_too_and_a_stack_once():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3))(x)
            x = nn.ConvTranspose(4, (2, 2), (2, 2), padding="VALID")(x)
            stack = nn.scan(nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3)
            return nn.DenseGeneral((2, 3))(stack()(x, None)[0])

    x = jax.ShapeDtypeStruct((5, 12, 12, 3), jnp.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    rows = jaxsparse.summary(Net(), variables, x)
    assert {row.kind: row.flops for row in rows} == {
        "Conv": 5 * IMAGE,
        "ConvTranspose": 5 * LATER,
        "Dense": 3 * 5 * 2 * 24 * 24 * 16,
        "DenseGeneral": 5 * 2 * 24 * 24 * 24,
    }


def test_of_a_call_in_torch_convolutions_count_too_and_the_model_stays_as_it_is():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch.nn.utils import prune

    import torch_bridge

    layer = torch_bridge.SparseLinear(4 * 24 * 24, 8, density=0.25)
    shared = torch_bridge.BlockDiagLinear(8, 8, 2)
    pruned = prune.l1_unstructured(torch.nn.Linear(8, 8), "weight", 0.5)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ConvTranspose2d(16, 4, 2, stride=2),
        torch.nn.Flatten(),
        layer,
        shared,
        shared,
        pruned,
        torch.nn.Conv1d(8, 6, 1, groups=2),
    )
    model[-1].register_forward_pre_hook(lambda module, args: args[0][..., None])
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    weight = pruned.weight
    summed = jaxsparse.summary(model, torch.ones(5, 3, 12, 12, device="meta"))
    of_blocks = 2 * 5 * 2 * 32
    linear = [5 * 2 * layer.weight.numel(), of_blocks, 5 * 2 * 64]
    assert [row.flops for row in summed] == [5 * IMAGE, 0, 5 * LATER, *linear, 5 * 2 * 6 * 4]
    assert sum(summed.share(row) or 0 for row in summed) == pytest.approx(1)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items()) and pruned.weight is weight
    assert model(torch.ones(5, 3, 12, 12)).shape == (5, 6, 1)


def test_the_table_has_a_line_a_layer_and_the_totals():
    text = str(jaxsparse.summary(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))).splitlines()
    assert text[0].split()[:3] == ["path", "kind", "shape"] and len(text) == 3
    assert text[1].split() == ["(the", "model)", "Linear", "4x3", "1", "15", "60", "B", "100.0%"]
    assert text[2].split() == ["total", "15", "60", "B"]


def test_what_is_no_model_is_refused_and_so_are_missing_variables():
    with pytest.raises(TypeError, match="a module of Flax NNX, Flax Linen or PyTorch, got dict"):
        jaxsparse.summary({})
    with pytest.raises(TypeError, match=r"needs its variables: summary\(model, variables\)"):
        jaxsparse.summary(nn.Dense(3))
    with pytest.raises(TypeError, match="which has its parameters in it"):
        jaxsparse.summary(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), {})


def test_a_summary_as_a_dict_is_what_json_takes():
    row = summaries.Row("a", "Conv", (3, 3), None, 1.0, 9, 36, None)
    told = summaries.Summary((row,)).as_dict()
    assert told["rows"][0]["share_of_flops"] is None and told["parameters"] == 9 and told["flops"] == 0
