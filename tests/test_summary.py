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
    assert [row.flops for row in rows.values()] == [2 * 32 * 64, 0, 2 * 64 * 32, 2 * 2048, 2 * 64 * 16]
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
