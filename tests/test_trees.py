"""Any tree in a file: every container and key comes back, into a target too, or is refused with its path and type."""

import collections
import dataclasses
import os
import types
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import jaxsparse
from jaxsparse import BlockPattern, checkpoint

X = jnp.ones((3, 16))
PATTERN = BlockPattern.random(jax.random.key(0), (16, 8), density=0.4, block=(3, 2))


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Struct:
    array: Any
    name: str = flax.struct.field(pytree_node=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    array: Any
    more: Any


class Model(nnx.Module):
    def __init__(self, rngs):
        sparse = lambda: jaxsparse.SparseLinear(16, 16, density=0.3, rngs=rngs)  # noqa: E731
        self.layers = nnx.List([sparse(), sparse()])
        self.last = jaxsparse.BlockSparseLinear(16, 8, density=0.5, block=(3, 5), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def train_state(seed):
    layer = nn.Sequential([jaxsparse.SparseDense(8, 0.25), nn.Dense(3)])
    variables = flax.core.freeze(layer.init(jax.random.key(seed), X))
    floats = jax.tree.map(lambda a: a.dtype == jnp.float32, variables)
    tx = optax.masked(optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(1e-3)), floats)
    return TrainState.create(apply_fn=layer.apply, params=variables, tx=tx)


def stack(seed):
    def body(layer, h, _):
        return layer(h), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, h):
            lifted = nn.scan(body, variable_axes={"params": 0, "pattern": 0}, split_rngs={"params": True}, length=3)
            return lifted(jaxsparse.SparseDense(16, 0.25), h, None)[0]

    return Stack().init(jax.random.key(seed), X)


def multi(seed):
    params = {"a": jax.random.normal(jax.random.key(seed), (3,)), "b": jnp.zeros(2)}
    return optax.multi_transform({"x": optax.adam(1e-3), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y"}).init(params)


def n_of_m(seed):
    return jaxsparse.NMPattern.random(jax.random.key(seed), (9, 7), n=5, m=12)


NORMAL = lambda seed: jax.random.normal(jax.random.key(seed), (2, 3))  # noqa: E731
TREES = {  # a maker of the tree from a seed
    "nnx.state": lambda seed: nnx.state(Model(nnx.Rngs(seed))),
    "nnx.state of a list": lambda seed: nnx.state(nnx.List([Model(nnx.Rngs(seed))])),
    "parameters of a model": lambda seed: nnx.state(Model(nnx.Rngs(seed)), nnx.Param),
    "flat state": lambda seed: nnx.to_flat_state(nnx.state(Model(nnx.Rngs(seed)))),
    "pure dict": lambda seed: nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(seed)))),
    "nnx optimizer": lambda seed: nnx.state(nnx.Optimizer(Model(nnx.Rngs(seed)), optax.adam(1e-3), wrt=nnx.Param)),
    "TrainState": train_state,
    "multi_transform": multi,
    "moments of a pattern": lambda seed: optax.adam(1e-3).init(
        {"p": BlockPattern.random(jax.random.key(seed), (9, 8), density=0.3)}
    ),
    "stack of patterns": stack,
    "n of m": lambda seed: n_of_m(seed).T,
    "a stack of n of m": lambda seed: jax.vmap(n_of_m)(seed + jnp.arange(3)),
    "moments of n of m": lambda seed: optax.adam(1e-3).init({"p": n_of_m(seed)}),
    "frozen": lambda seed: flax.core.freeze({"a": {"b": NORMAL(seed)}, "c": {}}),
    "lists and tuples": lambda seed: [NORMAL(seed), (), [], ({}, (NORMAL(seed + 1),))],
    "classes": lambda seed: Pair(Struct(NORMAL(seed), "x"), Data(None, {"a": Pair(1, NORMAL(seed))})),
    "ordered": lambda seed: collections.OrderedDict(b=NORMAL(seed), a=collections.defaultdict(list, {"x": seed})),
    "keys": lambda seed: {"old": jax.random.PRNGKey(seed), "new": jax.random.split(jax.random.key(seed, impl="rbg"))},
    "one array": NORMAL,
    "one pattern": lambda seed: BlockPattern.random(jax.random.key(seed), (9, 7), density=0.5).T,
    "one number": lambda seed: seed,
}


def bits(leaf):
    """A leaf as something that compares exactly."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes(), leaf.shape
    if hasattr(leaf, "dtype"):
        return str(leaf.dtype), np.asarray(leaf).tobytes(), np.shape(leaf)
    return type(leaf), repr(leaf)


def assert_equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert list(map(bits, jax.tree.leaves(got))) == list(map(bits, jax.tree.leaves(wanted)))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_into_another_of_its_structure(name, tmp_path):
    tree, target = TREES[name](0), TREES[name](1)
    before = list(map(bits, jax.tree.leaves(target)))
    checkpoint.save(tmp_path / "c", tree)
    got = checkpoint.load(tmp_path / "c", target)
    assert list(map(bits, jax.tree.leaves(got))) == list(map(bits, jax.tree.leaves(tree)))
    assert jax.tree.structure(got) == jax.tree.structure(target)  # static fields are the target's
    assert list(map(bits, jax.tree.leaves(target))) == before


@pytest.mark.parametrize("name", TREES)
def test_every_leaf_of_a_tree_is_in_its_file(name, tmp_path):
    tree = TREES[name](0)
    checkpoint.save(tmp_path / "c", tree)
    found = collections.Counter(map(bits, jax.tree.leaves(checkpoint.load(tmp_path / "c"))))
    assert found == collections.Counter(map(bits, jax.tree.leaves(tree)))


def test_a_state_comes_back_as_the_pure_dict_that_a_model_takes(tmp_path):
    model, fresh = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    checkpoint.save(tmp_path / "c", nnx.state(model))
    tree = checkpoint.load(tmp_path / "c")
    assert list(tree["layers"]) == [0, 1] and isinstance(tree["layers"][0]["pattern"], BlockPattern)
    nnx.update(fresh, tree)
    np.testing.assert_array_equal(fresh(X), model(X))
    state = nnx.state(Model(nnx.Rngs(2)))
    nnx.replace_by_pure_dict(state, tree)
    assert_equal(state, nnx.state(model))


def test_shapes_alone_are_a_target(tmp_path):
    tree = TREES["stack of patterns"](0)
    checkpoint.save(tmp_path / "c", tree)
    assert_equal(checkpoint.load(tmp_path / "c", jax.eval_shape(lambda: tree)), tree)


def test_a_target_of_numpy_gets_numpy_and_one_on_a_device_its_device(tmp_path):
    device = jax.devices()[-1]
    checkpoint.save(tmp_path / "c", {"a": np.ones(3), "b": jnp.ones(3), "c": jnp.ones(3), "d": np.float32(2)})
    target = {"a": np.zeros(3), "b": jnp.zeros(3), "c": jax.device_put(jnp.zeros(3), device), "d": np.float32(0)}
    got = checkpoint.load(tmp_path / "c", target)
    assert [type(a) for a in got.values()] == [type(a) for a in target.values()]
    assert got["c"].devices() == {device} and got["c"].committed and not got["b"].committed


ODD = {
    "a": {"b": np.zeros(1), "": np.zeros(2)},
    "a.b": np.zeros(3),
    "a~2": np.zeros(17),
    1: np.zeros(4),
    "1": np.zeros(5),
    1.5: np.zeros(6),
    None: np.zeros(7),
    "None": np.zeros(8),
    ("x", 1): np.zeros(9),
    "x/1": np.zeros(10),
    "": np.zeros(11),
    "__metadata__": np.zeros(12),
    "\ud800": np.zeros(13),
    "\\ud800": np.zeros(14),
    "p": PATTERN,
    "p.col_ptr": np.zeros(15),
    "ä\n\"'\0": np.zeros(16),
}


def test_odd_keys_come_back_as_they_were_and_in_order(tmp_path):
    checkpoint.save(tmp_path / "c", ODD)
    got = checkpoint.load(tmp_path / "c")
    assert [(type(key), key) for key in got] == [(type(key), key) for key in ODD]
    assert isinstance(got.pop("p"), BlockPattern)
    for key, value in got.items():
        assert jax.tree.map(np.shape, value) == jax.tree.map(np.shape, ODD[key])
    assert type(next(iter(checkpoint.load(tmp_path / "c", {**ODD})))) is str
    checkpoint.save(tmp_path / "c", {True: 1})
    assert list(checkpoint.load(tmp_path / "c"))[0] is True


def test_odd_keys_make_names_that_other_readers_of_safetensors_take(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    checkpoint.save(tmp_path / "c", ODD)
    with safetensors.safe_open(tmp_path / "c", framework="numpy") as file:
        names = list(file.keys())
        sizes = {name: file.get_tensor(name).size for name in names if not name.startswith("p.")}
        assert file.get_tensor("p.row_index").size == PATTERN.nnzb
    assert sizes["a.b"] == 1 and sizes["a.b~2"] == 3
    assert sorted(sizes.values()) == [*range(1, 15), 16, 17]  # 15 is at p.col_ptr


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2**80, 0.1, -0.0, float("inf"), 1e-320, True, None, 1 - 2j, "", "a\ud800\0", (), [], {}),
        *(np.float32(1), np.zeros((0, 3)), np.array(1 + 2j), np.zeros((2, 0), np.complex64), np.array(True)),
        *(jnp.arange(3, dtype=d) for d in ("int4", "uint4", "float8_e4m3fnuz", "float8_e5m2", "complex64")),
        np.ones((3, 4), np.complex128).T,
    ],
    ids=repr,
)
def test_a_leaf_is_saved_exactly(value, tmp_path):
    checkpoint.save(tmp_path / "c", {"x": value})
    got = checkpoint.load(tmp_path / "c")["x"]
    assert bits(got) == bits(value)
    assert bits(checkpoint.load(tmp_path / "c", {"x": value})["x"]) == bits(value)


def test_what_has_only_the_form_of_a_pattern_comes_back_as_it_was(tmp_path):
    changed = dataclasses.replace(PATTERN, order=PATTERN.order[::-1], col_ptr=PATTERN.col_ptr.astype("float16"))
    checkpoint.save(tmp_path / "c", {"p": changed})
    assert_equal(checkpoint.load(tmp_path / "c"), {"p": changed})


def test_a_narrow_index_stays_narrow_and_a_target_may_choose(tmp_path):
    narrow = dataclasses.replace(PATTERN, row_index=PATTERN.row_index.astype("uint16"))
    checkpoint.save(tmp_path / "c", narrow)
    assert_equal(checkpoint.load(tmp_path / "c"), narrow)
    assert_equal(checkpoint.load(tmp_path / "c", PATTERN), PATTERN)


WRONG = {
    "a set": ({"a": [{1, 2}]}, r"\['a'\]\[0\] is a set"),
    "a function": ({"a": len}, r"\['a'\] is a builtin_function"),
    "an object": (Pair(object(), 1), r"\['first'\] is a object"),
    "strings in an array": ({"a": np.array(["x"])}, r"\['a'\] is <U1"),
    "objects in an array": ({"a": np.array([None])}, r"\['a'\] is object"),
    "dates": ({"a": np.zeros(2, "datetime64[s]")}, r"\['a'\] is datetime64"),
    "another byte order": ({"a": np.zeros(2, ">f4")}, r"\['a'\] is >f4"),
    "a masked array": ({"a": np.ma.masked_array([1.0], [True])}, r"\['a'\] is a numpy.ma.*MaskedArray"),
    "a shape": ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"\['a'\] is a jax.*ShapeDtypeStruct"),
    "bytes": ({"a": b"x"}, r"\['a'\] is a bytes"),
    "a deque": ({"a": collections.deque([1])}, r"\['a'\] is a collections.deque"),
    "a class that JAX does not know": ({"a": types.SimpleNamespace(x=1)}, r"\['a'\] is a types.SimpleNamespace"),
    "a key of NumPy": ({"a": {np.int64(1): 1}}, r"the key np.int64\(1\) in \['a'\] is a numpy.int64"),
    "a key of bytes": ({b"a": 1}, "the key b'a' in the top of the tree is a bytes"),
    "a model": (Model(nnx.Rngs(0)), "static.*nnx.state"),
    "a graph": (nnx.split(Model(nnx.Rngs(0))), r"\[0\] is a flax.nnx.*GraphDef without children.*static"),
    "a pattern of shapes": ({"p": jax.eval_shape(lambda: PATTERN)}, r"\['p'\]\['col_ptr'\] is a jax.*ShapeDtypeStruct"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_come_back_is_refused_with_its_path_and_type_and_nothing_is_written(name, tmp_path):
    tree, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", tree)
    assert not os.listdir(tmp_path)


def test_what_jax_has_given_up_is_refused_with_its_path(tmp_path):
    a = jnp.ones(3)
    a.delete()
    with pytest.raises(ValueError, match=r"\['a'\].*deleted"):
        checkpoint.save(tmp_path / "c", {"a": a})
    with pytest.raises(ValueError, match=r"\['a'\]"):
        jax.jit(lambda a: checkpoint.save(tmp_path / "c", {"a": a}))(jnp.ones(3))


SAVED = {"layers": [{"kernel": np.zeros((2, 3), np.float32), "pattern": PATTERN}], 1: 5, "key": jax.random.key(0)}
MISFITS = {
    "a shape": (
        {"kernel": np.zeros((3, 2), np.float32)},
        r"'kernel'\] is float32 of shape \(2, 3\) in the file.*\(3, 2\)",
    ),
    "a dtype": ({"kernel": np.zeros((2, 3), np.float16)}, r"'kernel'\] is float32 .* but float16"),
    "a number": ({"kernel": 1.0}, r"\['layers'\]\[0\]\['kernel'\] is float32 .* but a float in the target"),
    "nothing": ({"kernel": None}, "but None in the target"),
    "a container": ({"kernel": [1]}, r"is float32 .* but the target has a list"),
    "a pattern for an array": ({"kernel": PATTERN}, "but BlockPattern"),
    "an array for a pattern": ({"pattern": np.zeros(3)}, r"is BlockPattern.* in the file, but float64"),
    "another pattern's shape": (
        {"pattern": BlockPattern.random(jax.random.key(0), (16, 9), density=0.4, block=(3, 2))},
        r"\['pattern'\] is of shape \(16, 8\) in the file, but of shape \(16, 9\) in the target",
    ),
    "another pattern's block": (
        {"pattern": BlockPattern.random(jax.random.key(0), (16, 8), density=0.4, block=(2, 2))},
        "block",
    ),
    "another pattern's count": (
        {"pattern": BlockPattern.random(jax.random.key(0), (16, 8), density=0.5, block=(3, 2))},
        r"\['pattern'\]\['row_index'\] is int32 of shape",
    ),
    "another pattern's view": (
        {"pattern": BlockPattern.random(jax.random.key(0), (8, 16), density=0.4, block=(2, 3)).T},
        "transposed",
    ),
    "n of m": ({"pattern": n_of_m(0)}, r"\['pattern'\] is BlockPattern.* in the file, but NMPattern\(9x7, 5:12\)"),
    "another name": ({"weight": 1}, r"the target lacks|lacks \['layers'\]\[0\]\['weight'\]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_target_that_does_not_fit_is_refused_with_the_path(name, tmp_path):
    change, message = MISFITS[name]
    checkpoint.save(tmp_path / "c", SAVED)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "c", {**SAVED, "layers": [{**SAVED["layers"][0], **change}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, r"the target lacks \['layers'\]\[0\]"),
        ({1: 5.0}, r"\[1\] is a int in the file, but a float in the target"),
        ({1: np.int32(5)}, r"\[1\] is a int in the file, but int32 of shape \(\) in the target"),
        ({"1": 5}, r"the file lacks \['1'\]"),
        ({"key": jax.random.key(0, impl="rbg")}, r"\['key'\] is key<fry>.*key<rbg>"),
        ({"key": len}, r"\['key'\] is key<fry> .* but a builtin_function"),
    ],
)
def test_a_target_with_other_keys_or_numbers_is_refused_with_the_path(change, message, tmp_path):
    checkpoint.save(tmp_path / "c", SAVED)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "c", {**SAVED, **change})
    with pytest.raises(ValueError, match=r"the file lacks \[True\]; the target lacks \[1\]"):
        checkpoint.load(tmp_path / "c", {True if key == 1 else key: value for key, value in SAVED.items()})
