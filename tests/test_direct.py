"""The C++ kernels called without XLA, on torch's tensors and NumPy's arrays, over the cases of every back end."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import mostly_slow

import cpu_kernels as ck
from cpu_kernels import direct
from jaxsparse import testing

torch = pytest.importorskip("torch", reason="torch's tensors need torch")

if direct.why_not(torch):
    pytest.skip(f"the kernels can't be called directly: {direct.why_not(torch)}", allow_module_level=True)

KINDS = {"torch": torch, "NumPy": None}


def empty(shape, dtype: str, kind):
    return torch.empty(shape, dtype=getattr(torch, dtype)) if kind else np.empty(shape, dtype)


def of(a, kind):
    """A JAX array as the other library has it; NumPy has no bfloat16, torch takes its bits."""
    a = np.array(a)
    if not kind:
        return a
    bits = a.dtype.name == "bfloat16"
    t = torch.from_numpy(a.view(np.int16) if bits else a)
    return t.view(torch.bfloat16) if bits else t


def to_jax(a, kind):
    if kind and a.dtype == torch.bfloat16:
        return jnp.asarray(a.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.asarray(a.numpy() if kind else a)


def all_products(case, dtype, kind):
    """y, dx and dW of a case by the kernels, as JAX arrays; and its operands."""
    kernels, pattern = direct.Kernels(kind), case.pattern
    operands = testing.inputs(case, pattern, dtype)
    x, w, bias, dy = (of(a, kind) for a in operands)
    index = [of(a, kind) for a in pattern.index]
    y, dx, dw = (empty(a.shape, jnp.dtype(dtype).name, kind) for a in (dy, x, w))
    sizes = (*pattern.shape, *pattern.block)
    kernels.spmm(x, w, (*index[:2], None), bias, y, sizes, False)
    kernels.spmm(dy, w, index[2:], None, dx, sizes, True)
    kernels.sddmm(x, dy, index[:2], dw, sizes)
    found = {"y": y, "dx": dx, "dW": dw}
    both = [empty(a.shape, jnp.dtype(dtype).name, kind) for a in (x, w)]
    kernels.spmm_backward(x, dy, w, index, *both, None, sizes, False)
    found |= {"together dx": both[0], "together dW": both[1]}
    return {name: to_jax(a, kind) for name, a in found.items()}, operands


@pytest.mark.parametrize("kind, dtype", [("torch", "float32"), ("torch", "bfloat16"), ("NumPy", "float32")])
@pytest.mark.parametrize("case", mostly_slow(testing.CASES), ids=lambda c: c.name)
def test_every_product_is_as_close_as_the_dense_one(case, kind, dtype):
    found, operands = all_products(case, jnp.dtype(dtype), KINDS[kind])
    truth = testing.true_products(*operands, case.pattern)
    dense = testing.dense_products(*operands, case.pattern)
    for name, value in found.items():
        of_dense = name.removeprefix("together ")
        testing.assert_as_close_as_dense(value, truth[of_dense], dense[of_dense], name)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_the_other_dtypes(dtype, x64):
    case = next(c for c in testing.CASES if c.name == "149x698 by 16")
    found, operands = all_products(case, jnp.dtype(dtype), torch)
    truth, dense = (f(*operands, case.pattern) for f in (testing.true_products, testing.dense_products))
    for name, value in found.items():
        of_dense = name.removeprefix("together ")
        testing.assert_as_close_as_dense(value, truth[of_dense], dense[of_dense], name)


@pytest.mark.parametrize("sizes, batch", testing.BLOCK_DIAG_CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_block_diagonal_products_equal_those_of_every_block(sizes, batch, kind):
    (n, i, o), kernels = sizes, direct.Kernels(KINDS[kind])
    rng = np.random.default_rng(0)
    x, w, dy, bias = (rng.normal(size=s) for s in ((*batch, n * i), sizes, (*batch, n * o), (n * o,)))
    wanted = {
        "y": np.einsum("...ni,nio->...no", x.reshape(*batch, n, i), w).reshape(dy.shape) + bias,
        "dx": np.einsum("...no,nio->...ni", dy.reshape(*batch, n, o), w).reshape(x.shape),
        "dW": np.einsum("bni,bno->nio", x.reshape(-1, n, i), dy.reshape(-1, n, o)),
    }
    x, w, dy, bias = (of(a, KINDS[kind]) for a in (x, w, dy, bias))
    found = {name: empty(a.shape, "float64", KINDS[kind]) for name, a in wanted.items()}
    kernels.block_diag_matmul(x, w, bias, found["y"], False)
    kernels.block_diag_matmul(dy, w, None, found["dx"], True)
    kernels.block_diag_outer(x, dy, found["dW"])
    for name, value in found.items():
        np.testing.assert_allclose(np.asarray(value), wanted[name], rtol=1e-12, atol=1e-12)


def test_results_are_the_same_bits_on_one_thread_and_on_torchs_team():
    case = testing.Case("large", testing._random((512, 768), 0.2, 16), (200,))
    together, _ = all_products(case, jnp.dtype("float32"), torch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone, _ = all_products(case, jnp.dtype("float32"), torch)
    finally:
        torch.set_num_threads(threads)
    assert all((together[name] == alone[name]).all() for name in alone)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (5, 7)], ids=str)
def test_a_matrix_without_entries_has_products_of_zeros(shape):
    kernels, (inputs, outputs) = direct.Kernels(None), shape
    none, ptr = np.zeros(0, np.int32), [np.zeros(n + 1, np.int32) for n in shape]
    index = (ptr[1], none, ptr[0], none, none)
    x, dy = np.ones((3, inputs), np.float32), np.ones((3, outputs), np.float32)
    w, y, dx = np.zeros(0, np.float32), np.full_like(dy, 7), np.full_like(x, 7)
    kernels.spmm(x, w, (*index[:2], None), None, y, (*shape, 1, 1), False)
    kernels.spmm_backward(x, dy, w, index, dx, w.copy(), None, (*shape, 1, 1), False)
    assert not y.any() and not dx.any()


def test_activations_are_applied_after_the_bias():
    kernels, x = direct.Kernels(torch), torch.randn(5, 24)
    w, bias, y = torch.randn(3, 8, 4), torch.randn(12), torch.empty(5, 12)
    plain = x @ torch.block_diag(*w) + bias
    gelu = lambda t: torch.nn.functional.gelu(t, approximate="tanh")  # noqa: E731
    for name, f in (("relu", torch.relu), ("silu", torch.nn.functional.silu), ("gelu", gelu)):
        kernels.block_diag_matmul(x, w, bias, y, False, name)
        torch.testing.assert_close(y, f(plain))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_one_row_by_an_index_of_16_bits_gives_the_same_bits(dtype, isa):
    before, sizes = ck.isa(), (300, 70, 1, 1)
    try:
        ck.use_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        ptr, index = (of(a, torch) for a in testing._random(sizes[:2], 0.3, (1, 1))().index[:2])
        x, w, bias = (torch.randn(s).to(getattr(torch, dtype)) for s in ((1, 300), (len(index),), (70,)))
        y, narrow = torch.empty(2, 1, 70, dtype=x.dtype)
        kernels = direct.Kernels(torch)
        kernels.spmm(x, w, (ptr, index, None), bias, y, sizes, False, "relu")
        kernels.spmm(x, w, (ptr, index.to(torch.uint16), None), bias, narrow, sizes, False, "relu")
        assert y.any() and (narrow == y).all()
        with pytest.raises(ValueError, match=r"index 6\d+ of entry 0 is not in \[0, 300\)"):
            kernels.spmm(x, w, (ptr, (index + 60000).to(torch.uint16), None), bias, narrow, sizes, False)
        with pytest.raises(ValueError, match="the index is uint16, needs int32"):
            kernels.spmm(x.expand(2, -1).contiguous(), w, (ptr, index.to(torch.uint16), None), bias, y, sizes, False)
    finally:
        ck.use_isa(before)


@pytest.mark.parametrize("features", [2**16, 2**16 + 1])
def test_the_largest_index_of_16_bits(features):
    """Where no number of 16 bits is too large, none is refused."""
    kernels, x, y = direct.Kernels(None), np.arange(features, dtype=np.float32)[None], np.empty((1, 1), np.float32)
    lines = np.array([0, 2], np.int32), np.array([1, 2**16 - 1], np.uint16), None
    kernels.spmm(x, np.ones(2, np.float32), lines, None, y, (features, 1, 1, 1), False)
    assert y == 2**16


BAD = {
    "x of strides": (lambda a: {**a, "x": a["x"].T.contiguous().T}, "x is not contiguous"),
    "x of integers": (lambda a: {**a, "x": a["x"].int()}, "x must be float32, float64, bfloat16 or float16"),
    "w of another dtype": (lambda a: {**a, "w": a["w"].double()}, "blocks is float64, needs float32"),
    "w of another shape": (lambda a: {**a, "w": a["w"][:-1]}, r"blocks has shape \[11, 4, 8\], needs \[12, 4, 8\]"),
    "y too small": (lambda a: {**a, "y": a["y"][:-1]}, r"y has shape \[5, 32\], needs \[6, 32\]"),
    "bias too long": (lambda a: {**a, "bias": torch.zeros(33)}, r"bias has shape \[33\], needs \[32\]"),
    "index of int64": (lambda a: {**a, "index": a["index"].long()}, "the index is another dtype, needs int32"),
    "index too large": (lambda a: {**a, "index": a["index"] + 5}, r"is not in \[0, 6\)"),
    "index negative": (lambda a: {**a, "index": a["index"] - 5}, r"index -\d of entry 0 is not in \[0, 6\)"),
    "pointers fall": (lambda a: {**a, "ptr": a["ptr"].flip(0)}, "index pointers begin with 12, not 0"),
    "pointers end early": (lambda a: {**a, "ptr": a["ptr"].clamp(max=7)}, "end with 7, but there are 12"),
}


@pytest.mark.parametrize("change, error", BAD.values(), ids=BAD)
def test_operands_that_do_not_fit_are_refused_with_the_numbers(change, error):
    pattern = testing._random((24, 32), 0.5, (4, 8))()
    ptr, index = (of(a, torch) for a in pattern.index[:2])
    given = {"x": torch.randn(6, 24), "w": torch.randn(12, 4, 8), "y": torch.empty(6, 32), "bias": torch.zeros(32)}
    a = change({**given, "ptr": ptr, "index": index})
    with pytest.raises(ValueError, match=f"cpu_kernels.spmm: .*{error}"):
        lines = (a["ptr"], a["index"], None)
        direct.Kernels(torch).spmm(a["x"], a["w"], lines, a["bias"], a["y"], (24, 32, 4, 8), False)


@pytest.mark.parametrize("what", [3, torch.zeros(1, 1, device="meta"), torch.zeros(1, 1).to_sparse()], ids=str)
def test_what_is_no_tensor_with_memory_is_an_error_of_torchs_own(what):
    with pytest.raises((TypeError, RuntimeError, BufferError)):
        direct.Kernels(torch).block_diag_outer(what, torch.zeros(1, 1), torch.zeros(1, 1, 1))


def test_a_tensor_of_zeros_that_has_no_memory_is_refused():
    with pytest.raises(ValueError, match="dy has no memory"):
        direct.Kernels(torch).block_diag_outer(
            torch.zeros(1, 1), torch._efficientzerotensor(1, 1), torch.zeros(1, 1, 1)
        )


def test_a_torch_without_the_exchange_table_is_named_with_what_it_lacks():
    class Old:
        __version__ = "2.9.1"
        Tensor = object

    assert "torch 2.9.1 has no DLPack exchange table" in str(direct.why_not(Old))
    with pytest.raises(NotImplementedError, match="2.9.1"):
        direct.Kernels(Old)


def test_neither_jax_nor_torch_is_imported():
    code = "import sys, cpu_kernels.direct; cpu_kernels.direct.Kernels(); print({'jax', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_both_faces_use_one_instruction_set():
    before = ck.isa()
    ck.use_isa("portable")
    try:
        assert direct.opened().jaxsparse_cpu_isa() == b"portable"
    finally:
        ck.use_isa(before)


@pytest.mark.parametrize("isa, kept", [("portable", True), ("avx512", True), ("amx", False)])
def test_tile_registers_alone_take_subnormal_numbers_for_zeros(isa, kept):
    before = ck.isa()
    try:
        ck.use_isa(isa)
    except ValueError as lacking:
        pytest.skip(str(lacking))
    x, values, y = (
        torch.full(size, v).bfloat16() for size, v in (((16, 32), 2.0**-130), ((1, 32, 32), 2.0**20), ((16, 32), 9))
    )
    lines = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), None
    try:
        direct.Kernels(torch).spmm(x, values, lines, None, y, (32, 32, 32, 32), False)
    finally:
        ck.use_isa(before)
    assert bool((y.double() == (32 * 2.0**-110 if kept else 0)).all())
