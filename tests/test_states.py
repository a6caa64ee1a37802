"""Patterns out of what savers made of them: checked in full, and back into a model that then computes the same."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxsparse.linen  # which tells Flax how a pattern is serialized
import jaxsparse.nnx
from jaxsparse import BlockPattern, checkpoint

X = jnp.ones((3, 16))
PATTERN = BlockPattern.random(jax.random.key(0), (16, 9), density=0.4, block=(3, 2))


def by_leaf_names(pattern):
    """What Orbax gives back of a pattern, as the pytree says it."""
    pairs = jax.tree_util.tree_flatten_with_path(pattern)[0]
    return {path[0].name: np.array(leaf) for path, leaf in pairs}


FORMS = {"leaves": by_leaf_names, "Flax": flax.serialization.to_state_dict}
STACK = jax.vmap(lambda key: BlockPattern.random(key, (16, 9), density=0.4))(jax.random.split(jax.random.key(0), 3))
PATTERNS = {"blocks": PATTERN, "a view": PATTERN.T, "a stack": STACK}


class Model(nnx.Module):
    def __init__(self, seed, features=8):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([jaxsparse.SparseLinear(16, 16, density=0.3, rngs=rngs) for _ in range(2)])
        self.last = jaxsparse.BlockSparseLinear(16, features, density=0.5, block=(3, 5), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def through_orbax(tree, folder, kind="standard"):
    """Saved, and restored without a target."""
    handler = ocp.StandardCheckpointer() if kind == "standard" else ocp.PyTreeCheckpointer()
    with handler as checkpointer:
        checkpointer.save(folder, tree)
        if kind == "standard":
            checkpointer.wait_until_finished()
        return checkpointer.restore(folder)


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_comes_back_from_its_state(name, form):
    pattern = PATTERNS[name]
    state = FORMS[form](pattern)
    assert_same(BlockPattern.from_state(state), pattern)
    tree = {"a": [state, (1, None)], "b": state["col_ptr"] if "col_ptr" in state else 3}
    assert_same(checkpoint.restore_patterns(tree), {**tree, "a": [pattern, (1, None)]})


def test_a_pattern_does_not_share_memory_with_its_state():
    state = by_leaf_names(PATTERN)
    pattern = BlockPattern.from_state(state)
    for a in state.values():
        a[...] = 0
    assert_same(pattern, PATTERN)


@pytest.mark.parametrize("form", FORMS)
def test_every_array_with_one_changed_number_is_refused(form):
    for name, a in FORMS[form](PATTERN).items():
        if np.size(a) < 3:
            continue  # sizes: the next test
        for k in range(np.size(a)):
            state = {key: np.array(value) for key, value in FORMS[form](PATTERN).items()}
            state[name][k] += 1
            with pytest.raises(ValueError):
                BlockPattern.from_state(state)


LEAVES, FIELDS = by_leaf_names(PATTERN), flax.serialization.to_state_dict(PATTERN)
OTHER = by_leaf_names(BlockPattern.random(jax.random.key(0), (15, 9), density=0.4, block=(3, 2)))  # the same grid
WRONG = {
    "a list": ([], "a dict of its arrays, got list"),
    "an empty dict": ({}, "lacks"),
    "other names": ({"a": 1}, r"lacks \['col_ptr'.*and has \['a'\]"),
    "a leaf too few": (dict(list(LEAVES.items())[1:]), "not the 5 arrays of one pattern"),
    "leaves of two patterns": (dict([*list(LEAVES.items())[1:], next(iter(OTHER.items()))]), "not the 5 arrays of one"),
    "leaves of two patterns, all there": ({**LEAVES, **OTHER}, "not the 5 arrays of one pattern"),
    "a smaller grid": ({**FIELDS, "shape": np.array([12, 9])}, "row index . at position .* outside 0 to 3"),
    "a wider grid": ({**FIELDS, "shape": np.array([16, 19])}, "10 columns take a col_ptr of shape"),
    "a block of zero": ({**FIELDS, "block": np.array([0, 2])}, "at least"),
    "another view": ({**FIELDS, "transposed": np.array([True])}, "columns take a col_ptr"),
    "two views": ({**FIELDS, "transposed": np.array([True, False])}, "one truth value"),
    "floats": ({**FIELDS, "order": FIELDS["order"].astype(float)}, "order is not what follows"),
    "rows of floats": ({**FIELDS, "row_index": FIELDS["row_index"].astype(float)}, "row indices must be integers"),
    "pointers of floats": ({**FIELDS, "col_ptr": FIELDS["col_ptr"].astype(float)}, "col_ptr must be integers"),
    "an array of the stack alone": ({**FIELDS, "order": FIELDS["order"][None]}, "not the arrays of one pattern"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pattern_is_refused(name):
    state, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        BlockPattern.from_state(state)


def test_a_dict_with_a_patterns_names_that_is_none_is_refused_with_its_path():
    with pytest.raises(ValueError, match=r"\['a'\]\[0\]: .*order is not what follows"):
        checkpoint.restore_patterns({"a": [{**FIELDS, "order": FIELDS["order"][::-1]}]})


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax, of a restore without a target
@pytest.mark.parametrize("kind", ["standard", "pytree"])
def test_an_nnx_model_comes_back_from_orbax_without_a_target(kind, tmp_path):
    model, fresh = Model(0), Model(1)
    restored = through_orbax(nnx.to_pure_dict(nnx.state(model)), tmp_path / "c", kind)
    tree = checkpoint.restore_patterns(nnx.restore_int_paths(restored))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, tree)
    nnx.update(fresh, state)
    np.testing.assert_array_equal(fresh(X), model(X))
    assert_same(nnx.state(fresh), nnx.state(model))


def test_an_nnx_model_takes_the_dicts_of_orbax_by_itself(tmp_path):
    model, fresh, other = Model(0), Model(1), Model(2)
    restored = nnx.restore_int_paths(through_orbax(nnx.to_pure_dict(nnx.state(model)), tmp_path / "c"))
    nnx.update(fresh, restored)
    np.testing.assert_array_equal(fresh(X), model(X))
    last = restored["last"]["pattern"]
    replaced = other.last.pattern.replace(last)
    other.last.pattern.set_value(last)
    for pattern in (replaced, other.last.pattern):
        assert_same(pattern.get_value(), model.last.pattern.get_value())
    assert_same(jaxsparse.nnx.Pattern({"value": by_leaf_names(PATTERN)}).get_value(), PATTERN)


def test_an_nnx_model_refuses_the_dict_of_another_pattern_and_stays_as_it_was(tmp_path):
    fresh = Model(1)
    before = nnx.state(fresh)["last"]["pattern"].get_value()
    for restored in (by_leaf_names(Model(0, 9).last.pattern.get_value()), {"kernel": X}, OTHER):
        with pytest.raises(ValueError, match="does not fit the layer's|lacks"):
            nnx.update(fresh, {"last": {"pattern": restored}})
        with pytest.raises(ValueError, match="does not fit the layer's|lacks"):
            fresh.last.pattern.set_value(restored)
    assert_same(fresh.last.pattern.get_value(), before)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax, of a restore without a target
@pytest.mark.parametrize("kind", ["standard", "pytree", "msgpack"])
def test_a_linen_model_comes_back_without_a_target(kind, tmp_path):
    layer = jaxsparse.SparseDense(8, 0.25)
    variables = layer.init(jax.random.key(0), X)
    if kind == "msgpack":
        restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(variables))
    else:
        restored = through_orbax(variables, tmp_path / "c", kind)
    with pytest.raises(ValueError, match="the pattern is a dict.*restore_patterns"):
        layer.apply(restored, X)
    tree = checkpoint.restore_patterns(restored)
    assert_same(tree, variables)
    np.testing.assert_array_equal(layer.apply(tree, X), layer.apply(variables, X))
    fresh = layer.init(jax.random.key(1), X)
    assert_same(flax.serialization.from_state_dict(fresh, restored), variables)


def test_flax_refuses_damaged_bytes_of_a_pattern():
    state = flax.serialization.to_state_dict(PATTERN)
    data = flax.serialization.msgpack_serialize({**state, "row_index": np.array(state["row_index"])[::-1]})
    with pytest.raises(ValueError, match="unsorted|out of range|duplicate"):
        flax.serialization.from_bytes(PATTERN, data)
