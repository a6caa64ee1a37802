"""Random trees, keys, dtypes and patterns, saved, loaded and converted: nothing is lost.

JAXSPARSE_FUZZ_EXAMPLES=100000 runs it for longer, and `make test-all` with 600.
"""

import collections
import dataclasses
import os
from typing import Any, NamedTuple

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import DTYPES, EXAMPLES, SIZES, draw_pattern

import jaxsparse.linen  # noqa: F401  (which tells Flax how a pattern is serialized)
from jaxsparse import BlockPattern, checkpoint, testing
from jaxsparse._indices import Index

FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ARRAYS = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2fnuz", "complex64", "complex128"]
ARRAYS += ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "int4", "uint4"]
SHAPES = [(), (0,), (1,), (5,), (2, 3), (0, 3), (2, 0, 1), (1, 1, 2, 2)]


KEY = jax.random.key(0)


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    one: Any
    other: Any


KEYS = ["a", "b", "a.b", "0", "1", "~2", "a~2", "", "/", "a/1", "__metadata__", "\ud800", "\\ud800", '\0"\n', "col_ptr"]
KEYS += [0, 1, -7, 2**70, 1.5, float("inf"), None, ("a", "b"), ("a", 1), ()]
NUMBERS = [0, 1, -(2**70), True, False, None, 0.1, -0.0, 5e-324, float("-inf"), 1 - 2j, "", "a", "\ud800\0"]
# Trees are drawn by NumPy from a seed: hypothesis would take longer to draw one than to save it.
seeds = st.integers(0, 2**32 - 1)


def draw_array(rng):
    dtype, shape = ARRAYS[rng.integers(len(ARRAYS))], SHAPES[rng.integers(len(SHAPES))]
    a = rng.integers(0, 2, shape).astype(dtype)
    wide = dtype in ("float64", "complex128", "int64", "uint64")  # JAX would narrow these
    return (a, a.T, a if wide else jnp.asarray(a))[rng.integers(3)]


def draw_tree_pattern(rng):
    shape, block, _ = (SIZES[:2] + SIZES[3:5])[rng.integers(4)]
    pattern = draw_pattern(rng, shape, block, (0, 0.1, 1.0)[rng.integers(3)], 1.0)
    index = {name: np.asarray(a) for name, a in pattern.index._asdict().items()}
    if rng.integers(2):
        index["row_index"] = index["row_index"].astype(np.uint16)
    if not rng.integers(4):  # a stack, as a scanned layer has it
        index = {name: a[None].repeat(2, 0) for name, a in index.items()}
    if not rng.integers(4):  # what only has the form of a pattern, as an optimizer's moments
        index = {name: np.zeros(a.shape, np.float32) for name, a in index.items()}
    pattern = dataclasses.replace(pattern, **{name: jnp.asarray(a) for name, a in index.items()})
    return pattern.T if rng.integers(2) else pattern


def draw_leaf(rng):
    kind = rng.integers(8)
    if kind == 0:
        return draw_tree_pattern(rng)
    if kind == 1:
        return jax.random.wrap_key_data(np.ones((2, 4), np.uint32), impl="rbg") if rng.integers(2) else KEY
    return NUMBERS[rng.integers(len(NUMBERS))] if kind < 4 else draw_array(rng)


def draw_tree(rng, depth):
    kind = rng.integers(9) if depth else 8
    if kind == 8:
        return draw_leaf(rng)
    children = [draw_tree(rng, depth - 1) for _ in range(rng.integers(4))]
    if kind == 0:
        return Pair(*(children * 2 + [1, None])[:2])
    if kind == 1:
        return Data(*(children * 2 + [None, 2.5])[:2])
    if kind in (2, 3):
        return (list, tuple)[kind - 2](children)
    pairs = [(KEYS[k], child) for k, child in zip(rng.permutation(len(KEYS)), children, strict=False)]
    if kind == 4:  # JAX keeps no order of these
        return flax.core.freeze({key: draw_leaf(rng) for key in sorted(str(key) for key, _ in pairs)})
    if kind == 5:
        return collections.defaultdict(list, pairs)
    return collections.OrderedDict(pairs) if kind == 6 else dict(pairs)


def children_of(tree):
    """The key and the child of a container, by its class, and not as the code under test finds them."""
    if isinstance(tree, flax.core.FrozenDict):
        return list(tree.items())
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, Data):
        return [("one", tree.one), ("other", tree.other)]
    if isinstance(tree, Pair):
        return [("first", tree.first), ("second", tree.second)]
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def plain(tree):
    """What a load without a target gives."""
    children = children_of(tree)
    if children is None:
        return tree
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Pair):
        return type(tree)([plain(child) for _, child in children])
    kind = collections.OrderedDict if isinstance(tree, collections.OrderedDict) else dict
    return kind((key, plain(child)) for key, child in children)


def mapped(f, tree):
    """The same containers with f of their leaves."""
    children = children_of(tree)
    if children is None:
        return f(tree)
    new = [mapped(f, child) for _, child in children]
    if isinstance(tree, (Pair, Data)):
        return type(tree)(*new)
    if isinstance(tree, (list, tuple)):
        return type(tree)(new)
    pairs = zip([key for key, _ in children], new, strict=True)
    return collections.defaultdict(list, pairs) if isinstance(tree, collections.defaultdict) else type(tree)(pairs)


def blank(leaf):
    """Other content of the same type, dtype and sizes."""
    if isinstance(leaf, BlockPattern):
        return dataclasses.replace(leaf, **{name: blank(a) for name, a in leaf.index._asdict().items()})
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(np.zeros_like(jax.random.key_data(leaf)), impl=str(jax.random.key_impl(leaf)))
    if hasattr(leaf, "dtype"):
        ones = np.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(ones) if isinstance(leaf, jax.Array) else ones
    return None if leaf is None else type(leaf)()


def assert_same(got, wanted, library=True):
    children = children_of(wanted)
    if isinstance(wanted, BlockPattern):
        assert isinstance(got, BlockPattern)
        assert (got.shape, got.block, got.transposed) == (wanted.shape, wanted.block, wanted.transposed)
        for name in Index._fields:
            assert_same(getattr(got, name), getattr(wanted, name), False)
    elif children is not None:
        assert type(got) is type(wanted)
        assert [(type(k), k) for k, _ in children_of(got)] == [(type(k), k) for k, _ in children]
        for (_, a), (_, b) in zip(children_of(got), children, strict=True):
            assert_same(a, b, library)
    elif isinstance(wanted, jax.Array) and jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(wanted))
    elif hasattr(wanted, "dtype"):
        assert isinstance(got, jax.Array) == isinstance(wanted, jax.Array) or not library
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    else:
        assert type(got) is type(wanted) and repr(got) == repr(wanted)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda *_: None)  # no kill comes here, and the disk is slow
    return tmp_path / "c"


def test_any_tree_is_saved_loaded_and_put_back_into_its_structure(path):
    @FUZZ
    @given(seeds, st.integers(0, 4))
    def check(seed, depth):
        tree = draw_tree(np.random.default_rng(seed), depth)
        checkpoint.save(path, tree)
        assert_same(checkpoint.load(path), plain(tree), library=False)
        assert_same(checkpoint.load(path, mapped(blank, tree)), tree)

    check()


def test_any_tree_of_tensors_is_saved_and_loaded(path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_bridge import checkpoint as in_torch

    def as_tensor(leaf):
        return in_torch._to_torch(np.array(leaf, order="C")) if hasattr(leaf, "dtype") else leaf

    def as_array(leaf):
        return in_torch._to_numpy(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def draw(rng):
        leaf = draw_array(rng) if rng.integers(2) else NUMBERS[rng.integers(len(NUMBERS))]
        return np.asarray(leaf, np.float32) if "int4" in str(getattr(leaf, "dtype", "")) else leaf  # torch has none

    @settings(FUZZ, max_examples=EXAMPLES // 4)
    @given(seeds)
    def check(seed):
        rng = np.random.default_rng(seed)
        groups = [{key: draw(rng) for key in KEYS[: rng.integers(9)]} for _ in range(3)]
        arrays = collections.OrderedDict([("0.weight", draw(rng)), (0, groups[0]), ("groups", groups)])
        in_torch.save(path, mapped(as_tensor, arrays))
        assert_same(mapped(as_array, in_torch.load(path)), arrays, library=False)
        assert_same(checkpoint.load(path), arrays, library=False)  # one format

    check()


@st.composite
def matrices(draw):
    shape, block, _ = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(seeds))
    pattern = draw_pattern(rng, shape, block, draw(st.sampled_from([0, 0.1, 1.0])), draw(st.sampled_from([0.0, 4.0])))
    values = rng.integers(-2, 3, pattern.values_shape)  # zeros that are stored must stay stored
    return pattern.T if draw(st.booleans()) else pattern, values, draw(st.sampled_from(DTYPES))


def dense(pattern, values):
    """The matrix, and where it is stored, by NumPy."""
    values = np.asarray(values)
    densify = testing.reference.densify
    return densify(values, pattern), densify(np.ones(values.shape, bool), pattern)


def by_leaf_names(pattern):
    return {path[0].name: np.array(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(pattern)[0]}


CONVERSIONS = {
    "SciPy": lambda p, v: BlockPattern.from_scipy(p.to_scipy(v.astype(np.float32))),
    "BCOO": lambda p, v: BlockPattern.from_bcoo(p.to_bcoo(v)),
    "BCSR": lambda p, v: BlockPattern.from_bcsr(p.to_bcsr(v)),
    "leaves": lambda p, v: (BlockPattern.from_state(by_leaf_names(p)), v),
    "Flax": lambda p, v: flax.serialization.from_bytes((p, v), flax.serialization.to_bytes((p, v))),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_any_pattern_is_converted_and_back(name):
    @settings(FUZZ, max_examples=EXAMPLES // 8)
    @given(matrices())
    def check(matrix):
        pattern, values, dtype = matrix
        values = jnp.asarray(values.astype(dtype))
        got_pattern, got = CONVERSIONS[name](pattern, values)
        assert name == "SciPy" or got.dtype == values.dtype
        for a, b in zip(dense(got_pattern, got), dense(pattern, values), strict=True):
            np.testing.assert_array_equal(a, b)

    check()


@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its compressed tensors a beta
def test_any_pattern_becomes_a_compressed_tensor_of_torch_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_bridge import _compressed

    @settings(FUZZ, max_examples=EXAMPLES // 8)
    @given(matrices())
    def check(matrix):
        pattern, values, _ = matrix
        (rows, cols), (i, o) = pattern.shape, pattern.block
        if rows % i or cols % o:
            return  # torch has no such tensor, which is refused and tested elsewhere
        got_pattern, got = _compressed.split(_compressed.join(pattern, torch.tensor(values, dtype=torch.float32)))
        for a, b in zip(dense(got_pattern, got.numpy()), dense(pattern, values), strict=True):
            np.testing.assert_array_equal(a, b)

    check()
