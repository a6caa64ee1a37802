"""Tensors across between torch and JAX: values, dtypes, ownership, and what is refused."""

import pytest

pytest.importorskip("torch", reason="torch_bridge needs torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch_bridge import BridgeError, jax2torch, jax_to_torch, torch_to_jax

DTYPES = "float32 float16 bfloat16 int8 int16 int32 uint8 uint16 uint32 bool complex64 float8_e4m3fn float8_e5m2"
BASE = torch.arange(24.0).reshape(4, 6)
ODD = {
    "transposed": BASE.t(),
    "row slice": BASE[1:],
    "column slice": BASE[:, 1:3],
    "step": BASE[::2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "flipped": BASE.flip(0),
    "misaligned": torch.arange(10.0)[1:],
    "scalar": torch.tensor(3.0),
    "size 0": torch.zeros(0, 3),
    "negative bit": torch._neg_view(BASE),
    "conjugate bit": torch.randn(4, dtype=torch.complex64).conj(),
    "imaginary part of a conjugate": torch.randn(4, dtype=torch.complex64).conj().imag,
    "overlapping": torch.arange(10.0).as_strided((4, 3), (1, 1)),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "requires grad": torch.ones(3, requires_grad=True),
    "zeros without memory": torch._efficientzerotensor(3),
}


@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_memory_crosses_with_its_values(name):
    t = ODD[name].detach()
    np.testing.assert_array_equal(torch_to_jax(ODD[name]), t.resolve_conj().resolve_neg().numpy(force=True))
    assert torch.equal(jax2torch(lambda x: x * 2)(t), t * 2)


@pytest.mark.parametrize("name", DTYPES.split())
def test_dtypes_survive_the_round_trip(name):
    t = torch.tensor([[0, 1, 2], [3, 1, 0]]).to(getattr(torch, name))
    array = torch_to_jax(t)
    assert array.dtype.name == name
    for back in (jax_to_torch(array), jax2torch(lambda x: x)(t)):
        assert back.dtype == t.dtype
        assert back.to(torch.complex64).equal(t.to(torch.complex64))


def test_copies_do_not_follow_the_original():
    t = torch.ones(1000)
    array = torch_to_jax(t)
    back = jax_to_torch(array)
    t.fill_(2.0)
    assert array.sum() == 1000 and back.sum() == 1000
    back.fill_(3.0)
    assert array.sum() == 1000


def test_a_misaligned_source_may_be_overwritten_at_once():
    n = 1 << 20
    t = torch.zeros(n + 32)[1 : n + 1]
    smallest = jax2torch(lambda x: x.min())
    for _ in range(5):
        t.fill_(1.0)
        array, y = torch_to_jax(t), smallest(t)
        t.fill_(2.0)
        assert y.item() == 1.0 and array.min() == 1.0


def test_trees_keep_their_structure_and_their_other_leaves():
    tree = {"a": [torch.ones(2), None], "b": (3, "text")}
    there = torch_to_jax(tree)
    assert isinstance(there["a"][0], jax.Array) and there["a"][1] is None and there["b"] == (3, "text")
    back = jax_to_torch(there)
    assert torch.equal(back["a"][0], torch.ones(2)) and back["b"] == (3, "text")


@pytest.mark.parametrize("dtype, narrow", [(torch.int64, "int32"), (torch.uint64, "uint32")])
def test_64_bit_integers_are_narrowed_where_they_fit(dtype, narrow):
    array = torch_to_jax(torch.tensor([0, 7, 2**31 - 1]).to(dtype))
    assert array.dtype == narrow and array.tolist() == [0, 7, 2**31 - 1]


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40 + 5])
def test_64_bit_integers_that_do_not_fit_are_refused(value):
    with pytest.raises(BridgeError, match=rf"1 values outside .*{value}.*jax_enable_x64"):
        torch_to_jax(torch.tensor([1, value]))


def test_with_64_bit_types_nothing_is_narrowed(x64):
    for t in (torch.tensor([2**40 + 5]), torch.tensor([1e300, 0.1], dtype=torch.float64)):
        assert torch.equal(jax_to_torch(torch_to_jax(t)), t)
        assert torch.equal(jax2torch(lambda x: x)(t), t)


REFUSED = {
    "float64": (torch.ones(2, dtype=torch.float64), r"lose precision.*\.float\(\).*jax_enable_x64"),
    "complex128": (torch.ones(2, dtype=torch.complex128), "lose precision"),
    "sparse": (torch.eye(2).to_sparse(), r"layout torch.sparse_coo.*to_dense"),
    "meta": (torch.ones(2, device="meta"), "meta has no memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_cross_is_refused_by_argument_reason_and_remedy(name):
    t, reason = REFUSED[name]
    with pytest.raises(BridgeError, match=reason):
        torch_to_jax(t)
    with pytest.raises(BridgeError, match=rf"double: argument 0\['a'\]: .*{reason}"):

        def double(tree):
            return tree["a"] * 2

        jax2torch(double)({"a": t})


def test_arrays_that_torch_cannot_hold_are_refused():
    with pytest.raises(BridgeError, match="key_data"):
        jax_to_torch(jax.random.key(0))
    with pytest.raises(BridgeError, match="int4"):
        jax_to_torch(jnp.ones(3, jnp.int4))
    with pytest.raises(BridgeError, match="tracer"):
        jax.jit(jax_to_torch)(jnp.ones(3))
