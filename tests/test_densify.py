"""Sparse Flax models made dense again compute the same, and hold nothing of ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import BlockDiagDense, BlockSparseDense, SparseDense, surgery

RULES = [
    (".*up", {"kind": "block_diag", "num_blocks": 4}),
    (".*mid", {"kind": "block_sparse", "density": 0.5, "block": (8, 3)}),
    (".*head", {"kind": "sparse", "density": 0.2}),
]
X = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, **options):
        options = {"rngs": nnx.Rngs(0), **options}
        self.up, self.mid = nnx.Linear(16, 32, **options), nnx.Linear(32, 32, **options)
        self.head, self.more = nnx.Linear(32, 5, **options, use_bias=False), self.mid

    def __call__(self, x):
        return self.head(self.more(nnx.relu(self.mid(self.up(x)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_nnx_model_goes_there_and_back(dtype):
    sparse, _ = surgery.sparsify(Net(dtype=dtype, param_dtype=dtype), RULES)
    dense = surgery.densify(sparse)
    assert {type(m) for _, m in nnx.iter_modules(dense)} == {Net, nnx.Linear} and dense.more is dense.mid
    assert dense.mid.kernel[...].dtype == dtype and dense.head.bias is None
    assert type(sparse.up) is jaxsparse.nnx.BlockDiagLinear  # the model itself stays as it is
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.float32(dense(X)), np.float32(sparse(X)), atol=tolerance, rtol=tolerance)
    again, report = surgery.sparsify(dense, [(".*mid|.*head", {"kind": "sparse", "keep": "nonzero"})])
    assert all(row.relative_error == 0 for row in report)
    np.testing.assert_allclose(np.float32(again(X)), np.float32(sparse(X)), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", jnp.tanh, None])
def test_an_nnx_layer_keeps_its_activation(activation):
    layer = jaxsparse.nnx.SparseLinear(16, 8, density=0.3, activation=activation, rngs=nnx.Rngs(0))
    dense = surgery.densify(nnx.Sequential(layer))
    np.testing.assert_allclose(dense(X), layer(X), atol=1e-5)


def test_stacked_nnx_layers_are_refused_by_path():
    stack = nnx.vmap(lambda rngs: jaxsparse.nnx.SparseLinear(4, 4, density=0.5, rngs=rngs))
    model = nnx.Dict(layers=stack(nnx.Rngs(0).split(3)))
    with pytest.raises(ValueError, match="layers: its kernel has shape .*, as layers that vmap or scan stacked"):
        surgery.densify(model)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, name="up")(x))
        return nn.Dense(5, name="head", use_bias=False)(nn.relu(nn.Dense(32, name="mid")(x)))


class ByHand(nn.Module):
    """The same with layers of ours."""

    @nn.compact
    def __call__(self, x):
        x = BlockDiagDense(32, 4, activation="relu", name="up")(x)
        x = BlockSparseDense(32, 0.5, (8, 3), activation="relu", name="mid")(x)
        return SparseDense(5, 0.2, use_bias=False, name="head")(x)


@pytest.mark.parametrize("sparse", [surgery.sparsify_linen(Plain(), RULES), ByHand()], ids=["by rules", "by hand"])
def test_linen_variables_fit_the_dense_model(sparse):
    variables = sparse.init(jax.random.key(0), X)
    dense = surgery.densify_variables(sparse, variables, X)
    shapes = jax.tree.map(jnp.shape, Plain().init(jax.random.key(0), X))
    assert jax.tree.map(jnp.shape, dense) == shapes and "pattern" in variables
    np.testing.assert_allclose(Plain().apply(dense, X), sparse.apply(variables, X), atol=1e-5)


def test_linen_layers_that_are_dense_or_stacked():
    half = surgery.sparsify_linen(Plain(), RULES[2:])
    variables = half.init(jax.random.key(0), X)
    dense = surgery.densify_variables(half, variables, X)
    assert dense["params"]["up"]["kernel"] is variables["params"]["up"]["kernel"]
    lift = {"variable_axes": {"params": 0, "pattern": 0}, "split_rngs": {"params": True}, "in_axes": 0, "axis_size": 2}
    stack = nn.vmap(SparseDense, **lift)(4, 0.5)
    x = X.reshape(-1, 4)[:2, None]
    with pytest.raises(ValueError, match="as layers that vmap or scan stacked"):
        surgery.densify_variables(stack, stack.init(jax.random.key(0), x), x)
