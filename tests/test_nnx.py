"""NNX layers: twins of the Linen ones bit for bit, and at home in every NNX function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxsparse
from jaxsparse import BlockPattern, testing
from jaxsparse.nnx import Pattern

KEY = jax.random.key(0)
X = testing.normal(0, (6, 96), jnp.float32)
TWINS = {
    "block-diagonal": (
        jaxsparse.BlockDiagDense(64, 4, activation="gelu"),
        lambda rngs: jaxsparse.BlockDiagLinear(96, 64, 4, activation="gelu", rngs=rngs),
    ),
    "block-sparse": (
        jaxsparse.BlockSparseDense(64, 0.3, 16, dtype=jnp.bfloat16),
        lambda rngs: jaxsparse.BlockSparseLinear(96, 64, density=0.3, block=16, dtype=jnp.bfloat16, rngs=rngs),
    ),
    "unstructured": (
        jaxsparse.SparseDense(64, 0.1, use_bias=False),
        lambda rngs: jaxsparse.SparseLinear(96, 64, density=0.1, use_bias=False, rngs=rngs),
    ),
}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = jaxsparse.BlockDiagLinear(96, 64, 4, activation="relu", rngs=rngs)
        self.second = jaxsparse.BlockSparseLinear(64, 64, density=0.4, block=16, use_bias=False, rngs=rngs)
        self.third = jaxsparse.SparseLinear(64, 10, density=0.2, rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.relu(self.second(self.first(x))))


@pytest.mark.parametrize("name", TWINS)
def test_linen_and_nnx_agree_bit_for_bit_given_the_same_parameters(name):
    linen, make = TWINS[name]
    variables, twin = linen.init(KEY, X), make(nnx.Rngs(3, pattern=4))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(twin, nnx.Param))) == jax.tree.map(
        jnp.shape, variables["params"]
    )
    for key, value in variables["params"].items():
        getattr(twin, key).set_value(value)
    if "pattern" in variables:
        twin.pattern.set_value(variables["pattern"]["pattern"])
    np.testing.assert_array_equal(twin(X), linen.apply(variables, X))


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.float16}])
def test_one_block_or_density_1_is_nnx_linear(options):
    dense = nnx.Linear(96, 64, rngs=nnx.Rngs(0), **options)
    one = jaxsparse.BlockDiagLinear(96, 64, 1, rngs=nnx.Rngs(0), **options)
    np.testing.assert_array_equal(one.kernel[...][0], dense.kernel[...])
    full = jaxsparse.BlockSparseLinear(96, 64, density=1, block=(20, 16), rngs=nnx.Rngs(0), **options)
    full.kernel.set_value(full.pattern.get_value().gather(dense.kernel[...]))
    for layer in (one, full):
        assert layer(X).dtype == dense(X).dtype
        tight = layer(X).dtype == jnp.float32
        np.testing.assert_allclose(layer(X), dense(X), rtol=1e-5 if tight else 2e-2, atol=1e-5 if tight else 2e-2)


def test_training_with_an_optimizer_lowers_the_loss_and_leaves_patterns_alone():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, Pattern))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: ((m(X) - 1) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, Pattern), before)


def test_split_merge_clone_and_eval_shape():
    model = Model(nnx.Rngs(0))
    graph, params, patterns = nnx.split(model, nnx.Param, Pattern)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(nnx.merge(graph, params, patterns)(X), model(X))
    np.testing.assert_array_equal(nnx.clone(model)(X), model(X))
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    assert abstract.third.pattern.get_value().shape == (64, 10)
    assert isinstance(nnx.to_pure_dict(nnx.state(model))["third"]["pattern"], BlockPattern)


def test_vmap_and_scan_over_layers():
    @nnx.vmap
    def make(key):
        return jaxsparse.SparseLinear(96, 96, density=0.1, rngs=nnx.Rngs(key))

    layers = make(jax.random.split(KEY, 3))
    together = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, X)
    h = X
    for k in range(3):
        one = jax.tree.map(lambda a, k=k: a[k], nnx.state(layers))
        layer = nnx.merge(nnx.graphdef(layers), one)
        np.testing.assert_allclose(together[k], layer(X), rtol=1e-5, atol=1e-5)
        h = layer(h)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(h, layer):
        return nnx.remat(lambda layer, h: layer(h))(layer, h)

    np.testing.assert_allclose(forward(X, layers), h, rtol=1e-4, atol=1e-4)


def test_a_replaced_pattern_is_used_without_a_new_trace():
    layer, traced = jaxsparse.SparseLinear(96, 64, density=0.1, rngs=nnx.Rngs(0)), 0

    @nnx.jit
    def call(layer, x):
        nonlocal traced
        traced += 1
        return layer(x)

    before = call(layer, X)
    layer.pattern.set_value(BlockPattern.random(jax.random.key(9), (96, 64), density=0.1))
    assert not np.array_equal(call(layer, X), before) and traced == 1


def test_orbax_restores_into_a_fresh_model(tmp_path):
    model, fresh = Model(nnx.Rngs(0)), Model(nnx.Rngs(1, pattern=2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(fresh, checkpointer.restore(tmp_path / "c", nnx.state(fresh)))
    np.testing.assert_array_equal(fresh(X), model(X))


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.first = jaxsparse.SparseLinear(96, 96, density=0.1, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Twins))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, blocks: blocks(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Twins(nnx.Module):
    def __init__(self, rngs):
        self.one = jaxsparse.SparseLinear(96, 96, density=0.1, rngs=rngs)
        self.two = jaxsparse.SparseLinear(96, 96, density=0.1, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


def rows(layer):
    return np.asarray(layer.pattern.get_value().row_index)


@pytest.mark.parametrize("make", [Model, Twins, Stacked])
def test_parameters_alone_fit_a_model_made_with_another_key(make):
    model, other = make(nnx.Rngs(0)), nnx.jit(make)(nnx.Rngs(1))
    assert not np.array_equal(model(X), other(X))
    nnx.update(other, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(other(X), model(X))


def test_a_wrapped_layer_fits_the_parameters_of_another_key_too():
    layer = nnx.bridge.ToLinen(jaxsparse.SparseLinear, args=(96, 64), kwargs={"density": 0.1})
    saved, other = (layer.init(jax.random.key(seed), X) for seed in (0, 1))
    got, want = (layer.apply({**v, "params": saved["params"]}, X) for v in (other, saved))
    np.testing.assert_array_equal(got, want)


def test_every_layer_has_a_pattern_of_its_own():
    twins, seeded = Twins(nnx.Rngs(0)), jaxsparse.SparseLinear(96, 96, density=0.1, seed=1, rngs=nnx.Rngs(0))
    assert not np.array_equal(rows(twins.one), rows(twins.two))
    assert not np.array_equal(rows(twins.one), rows(seeded))


def test_a_stream_named_pattern_gives_the_patterns_and_changes_no_value():
    default, drawn = Stacked(nnx.Rngs(0)), Stacked(nnx.Rngs(0, pattern=1))
    assert not np.array_equal(rows(default.first), rows(drawn.first))
    values = (nnx.state(model, nnx.Param) for model in (default, drawn))
    jax.tree.map(np.testing.assert_array_equal, *values)
    for model, alike in ((default, True), (drawn, False)):  # the layers of a stack
        first, second, _ = rows(model.blocks.one)
        assert np.array_equal(first, second) == alike


def test_bridge_from_linen_holds_parameters_and_pattern():
    module = nnx.bridge.ToNNX(jaxsparse.SparseDense(64, 0.1), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(module, X)
    assert module(X).shape == (6, 64)


REFUSED = {
    "inputs": (lambda r: jaxsparse.BlockDiagLinear(96, 64, 5, rngs=r), r"96 = 19 x 5 \+ 1"),
    "none": (lambda r: jaxsparse.SparseLinear(96, 64, rngs=r), "got none of them"),
    "two": (lambda r: jaxsparse.SparseLinear(96, 64, density=1, mask=np.eye(96, 64), rngs=r), "density and mask"),
    "mask": (lambda r: jaxsparse.SparseLinear(96, 64, mask=np.eye(64, 96), rngs=r), "Transpose it"),
    "density": (lambda r: jaxsparse.SparseLinear(96, 64, density=2, rngs=r), "density=2"),
    "nothing": (
        lambda r: jaxsparse.SparseLinear(96, 64, density=0, rngs=r),
        "density=0 leaves a layer without a weight",
    ),
    "almost nothing": (lambda r: jaxsparse.SparseLinear(96, 64, density=1e-5, rngs=r), "1e-05 x 6144 = 0.0614"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_raise_with_the_numbers(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


def test_sparse_linear_takes_no_block():
    with pytest.raises(TypeError, match="takes no block"):
        jaxsparse.SparseLinear(96, 64, density=0.1, block=4, rngs=nnx.Rngs(0))


def test_what_lies_beyond_the_edge_starts_at_zero():
    layer = jaxsparse.BlockSparseLinear(96, 50, density=0.5, block=(20, 15), rngs=nnx.Rngs(0))
    inside = layer.pattern.get_value().edge_mask()
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(layer.kernel[...] != 0, inside)
