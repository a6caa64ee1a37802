"""The C++ kernels against the dense product in float64, on every instruction set there is."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import mostly_slow

import cpu_kernels as ck
from cpu_kernels import _library

ISAS = ("portable", "avx2", "avx512")
EPSILON = {"float32": 2**-23, "float64": 2**-52, "bfloat16": 2**-7, "float16": 2**-10}


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        ck.use_isa(request.param)
    except ValueError as lacking:
        pytest.skip(str(lacking))
    return request.param


def each_isa_here():
    """Every instruction set of this machine, in use while the loop is at it. Tests with `isa` say which ones lack."""
    for name in ISAS:
        try:
            ck.use_isa(name)
        except ValueError:
            assert name != "portable"
            continue
        yield name


@pytest.fixture(autouse=True)
def _float64():
    """And the instruction set as it was before."""
    before = ck.isa()
    with jax.enable_x64(True):
        yield
    ck.use_isa(before)


def pattern_of(mask):
    """The index of a block mask [grid_in, grid_out]: stored by column, with the row view."""
    cols, rows = np.nonzero(mask.T)
    order = np.lexsort((cols, rows))

    def pointers(lines, count):
        return np.searchsorted(lines, np.arange(count + 1)).astype(np.int32)

    return types.SimpleNamespace(
        col_ptr=pointers(cols, mask.shape[1]),
        row_index=rows.astype(np.int32),
        row_ptr=pointers(rows[order], mask.shape[0]),
        col_index=cols[order].astype(np.int32),
        order=order.astype(np.int32),
        rows=rows,
        cols=cols,
    )


class Case:
    """A random problem and its dense truth in float64."""

    def __init__(self, m, shape, block, density, dtype, seed=0):
        rng = np.random.default_rng(seed)
        (i, o), (size_in, size_out) = block, shape
        grid = -(-size_in // i), -(-size_out // o)
        self.shape, self.block, self.dtype = shape, block, jnp.dtype(dtype)
        self.index = pattern_of(rng.random(grid) < density)
        nnzb = len(self.index.rows)
        values = (nnzb,) if block == (1, 1) else (nnzb, i, o)
        draw = lambda *s: jnp.asarray(rng.standard_normal(s), self.dtype)  # noqa: E731
        self.x, self.dy, self.blocks = draw(m, size_in), draw(m, size_out), draw(*values)
        self.bias = draw(size_out)
        padded = np.zeros((grid[0], i, grid[1], o))
        padded[self.index.rows, :, self.index.cols] = wide(self.blocks).reshape(nnzb, i, o)
        self.dense = padded.reshape(grid[0] * i, grid[1] * o)[:size_in, :size_out]

    @property
    def sizes(self):
        return {"shape": self.shape, "block": self.block}

    def sample(self, full):
        """Picks the stored blocks out of a dense matrix, zeros beyond its edge."""
        (i, o), (rows, cols) = self.block, full.shape
        padded = np.pad(full, ((0, -rows % i), (0, -cols % o)))
        pieces = padded.reshape(-(-rows // i), i, -(-cols // o), o)[self.index.rows, :, self.index.cols]
        return pieces.reshape(self.blocks.shape)


def wide(x):
    return np.asarray(x, np.float64)


def assert_close(got, truth, terms, dtype, what=""):
    """Within one rounding of the result and the usual growth of `terms` float32 sums."""
    epsilon = EPSILON[jnp.dtype(dtype).name]
    sums = EPSILON["float32"] if epsilon > 2**-30 else epsilon
    scale = np.max(np.abs(truth), initial=0) + 1
    atol = 4 * sums * scale * max(terms, 1) ** 0.5
    np.testing.assert_allclose(wide(got), truth, rtol=epsilon, atol=atol, err_msg=what)


SHAPES = [(37, 53), (64, 64), (130, 70), (5, 3)]
BLOCKS = [(1, 1), (8, 8), (16, 16), (32, 32), (64, 64), (4, 12), (5, 7), (3, 40), (16, 1), (1, 16)]
BATCHES = [0, 1, 3, 17, 70]


def products(case, x, dy, blocks, index):
    """Every product of a case by the kernels; of single entries also both gradients by one."""
    index = types.SimpleNamespace(**index)
    found = {
        "y": ck.spmm(x, blocks, index, **case.sizes),
        "dx": ck.spmm(dy, blocks, index, **case.sizes, transposed=True),
        "dW": ck.sddmm(x, dy, index, **case.sizes),
    }
    if case.block == (1, 1):
        found["fused dx"], found["fused dW"] = ck.spmm_grads(x, dy, blocks, index, **case.sizes)
    return found


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", mostly_slow(SHAPES), ids=str)
def test_products_and_gradients_match_the_dense_product(shape, block, dtype):
    cases = [Case(m, shape, block, 0.4, dtype) for m in BATCHES]
    operands = [(case.x, case.dy, case.blocks, vars(case.index)) for case in cases]
    program = jax.jit(lambda all: [products(case, *each) for case, each in zip(cases, all, strict=True)])
    for isa in each_isa_here():
        for m, case, got in zip(BATCHES, cases, program(operands), strict=True):
            x, dy, dense = wide(case.x), wide(case.dy), case.dense
            dw = case.sample(x.T @ dy)
            truth = {"y": (x @ dense, shape[0]), "dx": (dy @ dense.T, shape[1]), "dW": (dw, m)}
            for name, value in got.items():
                assert value.dtype == case.dtype
                assert_close(value, *truth[name.removeprefix("fused ")], dtype, f"{name}, {isa}, batch {m}")


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (5, 7)], ids=str)
def test_bias_and_activation_come_before_the_rounding(isa, block, activation, dtype):
    case = Case(19, (40, 50), block, 0.5, dtype)
    y = ck.spmm(case.x, case.blocks, case.index, **case.sizes, bias=case.bias, activation=activation)
    linear = wide(case.x) @ case.dense + wide(case.bias)
    assert_close(y, wide(getattr(jax.nn, activation)(linear)), 40, dtype)


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("sizes", [(1, 64, 64), (4, 16, 24), (3, 5, 7), (2, 130, 33)], ids=str)
def test_block_diagonal_products_match_an_einsum(sizes, dtype):
    n, i, o = sizes
    rng = np.random.default_rng(1)
    blocks = jnp.asarray(rng.standard_normal(sizes), dtype)
    operands = [
        (jnp.asarray(rng.standard_normal((m, n * i)), dtype), jnp.asarray(rng.standard_normal((m, n * o)), dtype))
        for m in BATCHES
    ]

    @jax.jit
    def program(operands, blocks):
        return [
            (
                ck.block_diag_matmul(x, blocks),
                ck.block_diag_matmul(dy, blocks, transposed=True),
                ck.block_diag_outer(x, dy, n),
            )
            for x, dy in operands
        ]

    for isa in each_isa_here():
        for m, (x, dy), (y, dx, dw) in zip(BATCHES, operands, program(operands, blocks), strict=True):
            what, x3, dy3 = f"{isa}, batch {m}", wide(x).reshape(m, n, i), wide(dy).reshape(m, n, o)
            assert_close(y, np.einsum("bni,nio->bno", x3, wide(blocks)).reshape(m, n * o), i, dtype, what)
            assert_close(dx, np.einsum("bno,nio->bni", dy3, wide(blocks)).reshape(m, n * i), o, dtype, what)
            assert_close(dw, np.einsum("bni,bno->nio", x3, dy3), m, dtype, what)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (8, 8)], ids=str)
def test_empty_lines_are_zero_and_full_ones_dense(isa, block, density):
    case = Case(33, (96, 80), block, density, "float32")
    y = ck.spmm(case.x, case.blocks, case.index, **case.sizes)
    assert_close(y, wide(case.x) @ case.dense, 96, "float32")


def test_large_problems_are_right_and_bitwise_the_same_again(isa):
    for block in [(1, 1), (32, 32)]:
        case = Case(200, (1000, 900), block, 0.2, "float32")
        y = ck.spmm(case.x, case.blocks, case.index, **case.sizes)
        assert_close(y, wide(case.x) @ case.dense, 1000, "float32")
        dw = ck.sddmm(case.x, case.dy, case.index, **case.sizes)
        assert_close(dw, case.sample(wide(case.x).T @ wide(case.dy)), 200, "float32")
        again = ck.spmm(case.x, case.blocks, case.index, **case.sizes)
        assert np.array_equal(np.asarray(y), np.asarray(again))


def test_a_batch_of_several_rounds_is_summed_over_all_of_them(isa):
    case = Case(27_000, (160, 16), (1, 1), 0.4, "float32")
    x, dy, dense = wide(case.x), wide(case.dy), case.dense
    y = ck.spmm(case.x, case.blocks, case.index, **case.sizes)
    assert_close(y, x @ dense, 160, "float32")
    dx, dw = ck.spmm_grads(case.x, case.dy, case.blocks, case.index, **case.sizes)
    assert_close(dx, dy @ dense.T, 16, "float32")
    assert_close(dw, case.sample(x.T @ dy), 27_000, "float32")


def with_(index, **changes):
    return types.SimpleNamespace(**{**vars(index), **changes})


def first_set_to(array, value):
    return np.concatenate([np.array([value], np.int32), array[1:]])


@pytest.mark.parametrize("block", [(1, 1), (8, 8)], ids=str)
@pytest.mark.parametrize(
    ("field", "value", "transposed", "words"),
    [
        ("row_index", -1, False, r"index -1 of entry 0 is not in \[0, "),
        ("row_index", 64, False, r"index 64 of entry 0 is not in \[0, "),
        ("col_ptr", 1, False, "begin with 1, not 0"),
        ("order", 1 << 20, True, "order 1048576 of entry 0"),
    ],
)
def test_a_bad_index_is_an_error_with_its_numbers(isa, block, field, value, transposed, words):
    case = Case(200, (64, 64), block, 0.5, "float32")
    bad = with_(case.index, **{field: first_set_to(getattr(case.index, field), value)})
    for rows in (1, 64, 200):  # a kernel of its own, one tile, several
        with pytest.raises(Exception, match=words):
            call = ck.spmm(case.x[:rows], case.blocks, bad, **case.sizes, transposed=transposed)
            jax.block_until_ready(call)


def test_bad_shapes_and_dtypes_are_errors_with_their_numbers():
    case = Case(8, (64, 48), (8, 8), 0.5, "float32")
    with pytest.raises(Exception, match=r"x has shape \[8, 48\], needs \[8, 64\]"):
        jax.block_until_ready(ck.spmm(case.dy, case.blocks, case.index, **case.sizes))
    with pytest.raises(Exception, match="blocks is bfloat16, needs float32"):
        halves = case.blocks.astype(jnp.bfloat16)
        jax.block_until_ready(ck.spmm(case.x, halves, case.index, **case.sizes))


def test_vmap_maps_one_product_at_a_time():
    case = Case(8, (32, 24), (1, 1), 0.5, "float32")
    xs = jnp.stack([case.x, 2 * case.x])
    ys = jax.vmap(lambda x: ck.spmm(x, case.blocks, case.index, **case.sizes))(xs)
    assert_close(ys[1], 2 * wide(case.x) @ case.dense, 32, "float32")


def test_the_reason_why_not_names_what_is_wrong():
    assert ck.why_not("spmm", "float32", (1, 1), "cpu") is None
    assert "gpu" in ck.why_not("spmm", "float32", (1, 1), "gpu")
    assert "int32" in ck.why_not("spmm", "int32", (1, 1), "cpu")
    assert "(8, 8)" in ck.why_not("spmm_grads", "float32", (8, 8), "cpu")


def test_a_library_newer_than_jaxlib_is_refused_before_it_is_registered():
    from cpu_kernels import _library

    assert _library._why_versions_clash((0, 3), (0, 3)) is None
    assert _library._why_versions_clash((0, 3), (0, 5)) is None
    assert "0.5, this jaxlib has 0.3" in _library._why_versions_clash((0, 5), (0, 3))
    assert "1.0" in _library._why_versions_clash((0, 3), (1, 0))


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(np.zeros((4, 4)), np.eye(4), 4, "float32")


def test_an_instruction_set_that_is_misspelt_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CPU_ISA", "avx513")
    before = ck.isa()
    assert "JAXSPARSE_CPU_ISA is 'avx513'" in (_library.why_not_opened.__wrapped__() or "")
    assert ck.isa() == before
    monkeypatch.setenv("JAXSPARSE_CPU_ISA", before)
    assert _library.why_not_opened.__wrapped__() is None
