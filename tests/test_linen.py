"""Linen layers: as nn.Dense where they are dense, patterns through every lift, checkpoints into a fresh model."""

import gc
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from sweeps import mostly_slow

import jaxsparse
import jaxsparse.surgery
from jaxsparse import BlockDiagDense, BlockPattern, BlockSparseDense, SparseDense, testing

KEY = jax.random.key(0)
X = testing.normal(0, (6, 96), jnp.float32)
MASK = np.random.default_rng(0).random((96, 64)) < 0.2
LAYERS = {
    "block-diagonal": jaxsparse.BlockDiagDense(64, 4),
    "block-sparse": jaxsparse.BlockSparseDense(64, 0.3, 16),
    "block-sparse, ragged": jaxsparse.BlockSparseDense(50, 0.5, (20, 15)),
    "block-sparse by mask": jaxsparse.BlockSparseDense(64, mask=MASK, block=8),
    "unstructured": jaxsparse.SparseDense(64, 0.1),
    "unstructured by mask": jaxsparse.SparseDense(64, mask=MASK, use_bias=False),
    "unstructured by pattern": jaxsparse.SparseDense(64, pattern=BlockPattern.from_mask(MASK)),
}
EQUAL_TO_DENSE = {
    "one block": jaxsparse.BlockDiagDense(64, 1),
    "density 1, blocks": jaxsparse.BlockSparseDense(64, 1.0, 16),
    "density 1, ragged blocks": jaxsparse.BlockSparseDense(64, 1.0, (20, 15)),
    "density 1": jaxsparse.SparseDense(64, 1.0),
}


def dense_params(layer, variables):
    """The parameters of the nn.Dense that computes the same."""
    params = variables["params"]
    if "pattern" in variables:
        kernel = variables["pattern"]["pattern"].to_dense(params["kernel"])
    else:
        kernel = jax.scipy.linalg.block_diag(*params["kernel"])
    return {**params, "kernel": kernel}


@pytest.mark.parametrize("name", EQUAL_TO_DENSE)
def test_one_block_or_density_1_is_nn_dense(name):
    layer = EQUAL_TO_DENSE[name]
    for dtype, x in ((None, X), (None, X.astype(jnp.bfloat16)), (jnp.bfloat16, X), (None, X[0]), (None, X[None, None])):
        sparse, dense = layer.clone(dtype=dtype), nn.Dense(64, dtype=dtype)
        variables = sparse.init(KEY, x)
        params = dense_params(sparse, variables)
        want, got = dense.apply({"params": params}, x), sparse.apply(variables, x)
        truth = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"])
        testing.assert_as_close_as_dense(got, truth, want)
    if "one" in name:  # the same key draws the same kernel
        np.testing.assert_array_equal(params["kernel"], dense.init(KEY, x)["params"]["kernel"])


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", ["block-diagonal", "block-sparse", "unstructured"])
def test_dtypes_follow_nn_dense(name, dtype, param_dtype):
    layer, dense = (
        LAYERS[name].clone(dtype=dtype, param_dtype=param_dtype),
        nn.Dense(64, dtype=dtype, param_dtype=param_dtype),
    )
    for x in (X, X.astype(jnp.bfloat16), jnp.ones((2, 96), jnp.int32)):
        (y, variables), (want, params) = (m.init_with_output(KEY, x) for m in (layer, dense))
        assert y.dtype == want.dtype
        kinds = jax.tree.map(jnp.result_type, (variables["params"], params["params"]))
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_its_dense_matrix(name):
    layer = LAYERS[name]
    variables = layer.init(KEY, X)
    params = dense_params(layer, variables)
    want = X @ params["kernel"] + params.get("bias", 0)
    np.testing.assert_allclose(layer.apply(variables, X), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_init_is_traceable_and_the_same_jitted(name):
    eager, jitted = LAYERS[name].init(KEY, X), jax.jit(LAYERS[name].init)(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    abstract = jax.eval_shape(LAYERS[name].init, KEY, X)
    assert jax.tree.map(jnp.shape, abstract["params"]) == jax.tree.map(jnp.shape, eager["params"])
    assert "kernel" in nn.tabulate(LAYERS[name], KEY)(X)


@pytest.mark.parametrize("name", mostly_slow(["block-sparse, ragged", "block-diagonal", "unstructured by pattern"]))
def test_scan_vmap_and_remat_lift_a_layer(name):
    layer = LAYERS[name]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, h):
            return h + nn.Dense(96)(nn.remat(type(layer))(**fields)(h)), None

    fields = {f: getattr(layer, f) for f in layer.__dataclass_fields__ if f not in ("parent", "name")}
    axes = {"params": 0, "pattern": 0}
    model = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)()
    variables = model.init(KEY, X)
    loss = lambda params: (model.apply({**variables, "params": params}, X)[0] ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(leaf.shape[0] == 3 and jnp.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(grads))
    twice = nn.vmap(type(layer), variable_axes=axes, split_rngs={"params": True})(**fields)
    stacked = twice.init(KEY, jnp.stack([X, X]))
    first = jax.tree.map(lambda a: a[0], stacked)
    got = twice.apply(stacked, jnp.stack([X, X]))
    np.testing.assert_allclose(got[0], layer.apply(first, X), rtol=1e-5, atol=1e-5)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jaxsparse.SparseDense(96, 0.1)(x)
        return jaxsparse.SparseDense(96, 0.1)(x) + nn.remat(jaxsparse.BlockSparseDense)(96, 0.3, 16, name="blocks")(x)


class Setup(nn.Module):
    def setup(self):
        self.one, self.two = jaxsparse.SparseDense(96, 0.1), jaxsparse.SparseDense(96, 0.1)
        self.nested = [Compact(), Compact()]

    def __call__(self, x):
        return self.nested[1](self.nested[0](self.two(self.one(x))))


class Step(nn.Module):
    @nn.compact
    def __call__(self, h):
        return h + jaxsparse.SparseDense(96, 0.1)(h), None


def stack(**split):
    axes = {"params": 0, "pattern": 0}
    return nn.scan(Step, variable_axes=axes, split_rngs={"params": True, **split}, length=3)()


PINNED = [6, 17, 28, 33, 47, 51, 68, 71]
MODELS = {
    "a layer": jaxsparse.SparseDense(64, 0.1),
    "a layer with a seed": jaxsparse.BlockSparseDense(64, 0.3, 16, seed=3),
    "compact": Compact(),
    "setup, nested": Setup(),
    "scanned": stack(),
    "a rule's": jaxsparse.surgery.sparsify_linen(
        nn.Sequential([nn.Dense(96)] * 2), [(".*", {"kind": "sparse", "density": 0.1})]
    ),
}


def rows(tree):
    """The row indices of all patterns in a tree."""
    patterns = jax.tree.leaves(tree, is_leaf=lambda p: isinstance(p, BlockPattern))
    return [np.asarray(p.row_index) for p in patterns]


@pytest.mark.parametrize("name", mostly_slow(MODELS, 2))
def test_parameters_alone_fit_a_model_made_with_another_key(name):
    model = MODELS[name]
    saved, other = model.init(KEY, X), jax.jit(model.init)(jax.random.key(1), X)
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (saved["params"], other["params"]))))
    got, want = (model.apply({**v, "params": saved["params"]}, X) for v in (other, saved))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_layer_has_a_pattern_of_its_own():
    drawn = rows(Setup().init(KEY, X)["pattern"])
    assert len(drawn) == 8 and len({r.tobytes() for r in drawn}) == 8
    seeds = [rows(jaxsparse.SparseDense(64, 0.1, seed=seed).init(KEY, X)["pattern"])[0] for seed in (0, 1)]
    assert not np.array_equal(*seeds)


def test_a_pattern_does_not_hang_on_the_settings_of_jax():
    make = lambda: rows(jaxsparse.SparseDense(64, 0.1).init(jax.random.key(0), X)["pattern"])[0]  # noqa: E731
    want = make()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(make(), want)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(make(), want)
    assert want[:8].tolist() == PINNED  # across processes and versions too


def test_stacked_layers_share_a_pattern_unless_a_stream_of_that_name_is_split():
    keys = {"params": KEY, "pattern": jax.random.key(1)}
    for split, rngs, alike in (({}, KEY, True), ({"pattern": True}, KEY, True), ({"pattern": True}, keys, False)):
        variables = stack(**split).init(rngs, X)
        (first, second, _), *_ = rows(variables["pattern"])
        assert np.array_equal(first, second) == alike
    one = jaxsparse.SparseDense(64, 0.1)
    drawn, default = one.init(keys, X), one.init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, drawn["params"], default["params"])
    assert not np.array_equal(*(rows(v["pattern"])[0] for v in (drawn, default)))


def test_parameters_alone_do_not_carry_a_pattern_that_moved_or_was_given():
    """What no check sees: such a pattern must be saved too, as every framework's checkpoint of the whole model does."""
    layer = jaxsparse.SparseDense(64, 0.1)
    variables, moved = layer.init(KEY, X), BlockPattern.random(KEY, (96, 64), density=0.1)
    trained = {**variables, "pattern": {"pattern": moved}}
    assert not np.allclose(layer.apply(variables, X), layer.apply(trained, X))


def test_a_mask_or_a_pattern_with_nothing_in_it_is_a_layer_of_its_bias():
    for options in ({"mask": np.zeros((96, 64))}, {"pattern": BlockPattern.random(KEY, (96, 64), density=0)}):
        layer = jaxsparse.SparseDense(64, bias_init=nn.initializers.ones_init(), **options)
        y, variables = layer.init_with_output(KEY, X)
        assert variables["params"]["kernel"].shape == (0,)
        np.testing.assert_array_equal(y, np.ones((6, 64)))


def test_optax_sees_only_floats():
    variables = LAYERS["unstructured"].init(KEY, X)
    state = optax.adamw(1e-3).init(variables["params"])
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("kind", ["serialization", "orbax"])
@pytest.mark.parametrize("name", ["block-diagonal", "block-sparse", "unstructured"])
def test_a_checkpoint_restores_into_a_fresh_model_with_its_pattern(name, kind, tmp_path):
    layer = LAYERS[name]
    saved, fresh = layer.init(KEY, X), layer.init({"params": jax.random.key(5), "pattern": jax.random.key(6)}, X)
    if kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "c", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "c", fresh)
    else:
        restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(saved))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    np.testing.assert_array_equal(layer.apply(restored, X), layer.apply(saved, X))


OTHERS = {
    "shape": BlockPattern.random(KEY, (90, 64), density=0.3, block=16),  # the same grid
    "block": BlockPattern.random(KEY, (96, 64), density=0.3, block=(16, 15)),
    "row_index": BlockPattern.random(KEY, (96, 64), density=0.5, block=16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_pattern_of_another_shape_is_refused(name, tmp_path):
    pattern = BlockPattern.random(KEY, (96, 64), density=0.3, block=16)
    data = flax.serialization.to_bytes(OTHERS[name])
    with pytest.raises(ValueError, match=f"saved pattern has {name}.*don't fit"):
        flax.serialization.from_bytes(pattern, data)
    with pytest.raises(ValueError, match="lacks"):
        flax.serialization.from_state_dict(pattern, {})


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # Orbax's, when it refuses
@pytest.mark.parametrize("name", OTHERS)
def test_orbax_refuses_a_pattern_of_another_shape(name, tmp_path):
    pattern = BlockPattern.random(KEY, (96, 64), density=0.3, block=16)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"pattern": OTHERS[name]})
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="not compatible|do not match"):
            checkpointer.restore(tmp_path / "c", {"pattern": pattern})
    gc.collect()  # the coroutines, here and not in another test


@pytest.mark.parametrize("name", mostly_slow(["unstructured", "block-diagonal", "block-sparse"]))
def test_a_deep_stack_keeps_the_scale_of_its_input(name):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(12):
                layer = {
                    "block-diagonal": jaxsparse.BlockDiagDense(512, 2, kernel_init=nn.initializers.he_normal()),
                    "block-sparse": jaxsparse.BlockSparseDense(512, 0.1, 16, kernel_init=nn.initializers.he_normal()),
                    "unstructured": jaxsparse.SparseDense(512, 0.05, kernel_init=nn.initializers.he_normal()),
                }[name]
                x = nn.relu(layer(x))
            return x

    x = testing.normal(0, (64, 512), jnp.float32)
    y, _ = Stack().init_with_output(KEY, x)
    scale = float(jnp.sqrt((y**2).mean() / (nn.relu(x) ** 2).mean()))
    assert 0.3 < scale < 3


REFUSED = {
    "inputs": (
        jaxsparse.BlockDiagDense(64, 5),
        r"inputs=96 .* 96 = 19 x 5 \+ 1. Pad inputs to 100, or use num_blocks=4",
    ),
    "features": (jaxsparse.BlockDiagDense(50, 4), r"50 = 12 x 4 \+ 2. Pad features to 52, or use num_blocks=5"),
    "no blocks": (jaxsparse.BlockDiagDense(50, 0), "num_blocks=0 must be at least 1"),
    "none": (jaxsparse.SparseDense(64), "exactly one of density, pattern and mask: got none"),
    "two": (jaxsparse.SparseDense(64, 0.5, mask=MASK), "got density and mask"),
    "three": (jaxsparse.BlockSparseDense(64, 0.5, pattern=OTHERS["block"], mask=MASK), "density and pattern and mask"),
    "mask shape": (jaxsparse.SparseDense(64, mask=MASK.T), r"\(64, 96\).*maps 96 features to 64. Transpose it"),
    "pattern shape": (jaxsparse.BlockSparseDense(64, pattern=OTHERS["shape"]), r"Make one of shape \(96, 64\)"),
    "density": (jaxsparse.SparseDense(64, 1.1), "density=1.1 is outside"),
    "nothing": (jaxsparse.SparseDense(64, 0), r"density=0 leaves a layer without a weight.*\(96, 64\), density=0"),
    "almost nothing": (
        jaxsparse.SparseDense(64, 1e-5),
        r"1e-05 x 6144 = 0.0614, rounded 0. Give a density of at least 1 / 6144 = 0.000163; density=0 if nothing",
    ),
    "blocks too large": (jaxsparse.BlockSparseDense(64, 0.05), "0.05 x 6 = 0.3, rounded 0.*1 / 6 = 0.167, or smaller"),
    "block": (jaxsparse.BlockSparseDense(64, 0.5, 128), r"128 > in=96.*at most \(96, 64\)"),
    "back end": (jaxsparse.SparseDense(64, 0.5, backend="cuda"), "unknown backend 'cuda'"),
    "activation": (jaxsparse.BlockDiagDense(64, 4, activation="elu"), "unknown activation 'elu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_raise_with_the_numbers(name):
    layer, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, X)


def test_apply_without_the_pattern_says_what_to_pass():
    variables = LAYERS["unstructured"].init(KEY, X)
    with pytest.raises(ValueError, match="found no pattern.*variables\\['pattern'\\]"):
        LAYERS["unstructured"].apply({"params": variables["params"]}, X)


def test_a_loaded_pattern_of_another_matrix_is_refused_at_the_call():
    variables = LAYERS["block-sparse"].init(KEY, X)
    with pytest.raises(ValueError, match="maps 80 features"):
        LAYERS["block-sparse"].apply(variables, X[:, :80])


PICKLED = {
    "entries": SparseDense(8, 0.5, activation="gelu"),
    "blocks": BlockSparseDense(8, pattern=BlockPattern.banded((8, 8), 1, 4)),
    "diagonal": BlockDiagDense(8, 2),
    "a model": nn.Sequential([SparseDense(8, mask=np.eye(8)), nn.LayerNorm()]),
}


@pytest.mark.parametrize("name", PICKLED)
def test_layers_are_pickled(name):
    layer, x = PICKLED[name], jnp.ones((1, 8))
    again = pickle.loads(pickle.dumps(layer))
    jax.tree.map(np.testing.assert_array_equal, again.init(KEY, x), layer.init(KEY, x))


def test_what_lies_beyond_the_edge_starts_at_zero():
    variables = LAYERS["block-sparse, ragged"].init(KEY, X)
    kernel, inside = variables["params"]["kernel"], variables["pattern"]["pattern"].edge_mask()
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(kernel != 0, inside)
