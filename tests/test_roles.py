"""Weight decay by role: kernels whatever their rank, and neither biases, nor norms, nor patterns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxsparse
from jaxsparse import BlockPattern, NMPattern, decay_mask
from jaxsparse.files import SparseMatrix


def decaying(params):
    """The paths that decay, without what a box or an NNX variable adds."""
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, on in jax.tree.leaves_with_path(mask) if on
    ]
    return {path.removesuffix(".value") for path in paths}


class Model(nn.Module):
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 8, name="embed")(x)
        x = nn.LayerNorm(name="norm")(jaxsparse.SparseDense(8, 0.5, kernel_init=self.kernel_init, name="entries")(x))
        x = jaxsparse.BlockSparseDense(8, 0.5, 4, name="blocks")(x)
        x = nn.Dense(8, name="dense")(jaxsparse.BlockDiagDense(8, 2, name="diagonal")(x))
        return nn.MultiHeadDotProductAttention(2, name="attention")(x)


KERNELS = {f"{layer}.kernel" for layer in ("entries", "blocks", "diagonal", "dense")} | {"embed.embedding"}


def test_kernels_of_linen_decay_whatever_their_rank():
    variables = Model().init(jax.random.key(0), jnp.zeros((3, 4), int))
    params = variables["params"]
    assert {params[name]["kernel"].ndim for name in ("entries", "dense", "blocks")} == {1, 2, 3}
    assert params["attention"]["query"]["bias"].ndim == 2
    found = decaying(params)
    assert found == KERNELS | {f"attention.{part}.kernel" for part in ("query", "key", "value", "out")}
    assert decaying(variables) == {f"params.{path}" for path in found}


def test_boxes_of_linen_are_looked_into():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None,))
    params = Model(boxed).init(jax.random.key(0), jnp.zeros((3, 4), int))["params"]
    assert isinstance(params["entries"]["kernel"], nn.Partitioned)
    assert KERNELS <= decaying(params)


def test_stacked_biases_and_norms_do_not_decay():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Sequential(jaxsparse.SparseLinear(8, 8, density=0.5, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))

    stack = make(nnx.Rngs(0))
    params = nnx.state(stack, nnx.Param)
    assert {leaf.ndim for leaf in jax.tree.leaves(params)} == {2}
    assert decaying(params) == {"layers.0.kernel"}
    assert decaying(nnx.state(stack)) == {"layers.0.kernel"}  # the pattern's integers among them
    assert decaying(nnx.to_pure_dict(params)) == {"layers.0.kernel"}


def test_values_beside_their_pattern_decay():
    pattern = BlockPattern.banded((6, 5), 1)
    values, other = jnp.ones(pattern.values_shape), jnp.ones(7)
    assert decaying({"w": {"values": values, "pattern": pattern, "gain": other}, "values": values}) == {"w.values"}
    assert decaying({"w": SparseMatrix(pattern, values)}) == {"w.values"}
    assert decaying([(pattern, values), (other, pattern.T), (values,)]) == {"0.1"}
    assert decaying({"w": (pattern, jnp.ones((2, *pattern.values_shape)))}) == {"w.1"}
    assert decaying({"bias": values, "pattern": pattern}) == set()
    of_m = NMPattern.random(jax.random.key(0), (8, 6), n=2, m=4)
    assert decaying({"w": (of_m, jnp.ones(of_m.values_shape), other)}) == {"w.1"}
    assert decaying(jnp.ones((2, 2))) == {""} and decaying(other) == set()


def test_optax_decays_an_unstructured_kernel_and_leaves_its_bias():
    layer = jaxsparse.SparseLinear(8, 8, density=0.5, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    before = np.asarray(layer.kernel[...])
    optimizer = nnx.Optimizer(layer, optax.adamw(0.5, weight_decay=0.5, mask=decay_mask), wrt=nnx.Param)
    optimizer.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer, nnx.Param)))
    np.testing.assert_allclose(layer.kernel[...], before * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias[...], 1)
