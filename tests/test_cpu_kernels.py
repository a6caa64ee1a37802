"""The C++ kernels against the dense product in float64, on every instruction set there is."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import mostly_slow

import cpu_kernels as ck
from cpu_kernels import _library
from jaxsparse import _xla, testing

ISAS = ("portable", "avx2", "avx512", "amx")
DTYPES = ("float32", "float64", "bfloat16", "float16")


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
    """A random problem and its dense truth in float64. Of whole numbers every sum is exact, in any order."""

    def __init__(self, m, shape, block, density, dtype, whole=False):
        rng = np.random.default_rng(0)
        (i, o), (size_in, size_out) = block, shape
        grid = -(-size_in // i), -(-size_out // o)
        self.shape, self.block, self.dtype, self.whole = shape, block, jnp.dtype(dtype), whole
        self.index = pattern_of(rng.random(grid) < density)
        nnzb = len(self.index.rows)
        values = (nnzb,) if block == (1, 1) else (nnzb, i, o)
        numbers = functools.partial(rng.integers, -2, 3) if whole else rng.standard_normal
        draw = lambda *s: jnp.asarray(numbers(size=s), self.dtype)  # noqa: E731
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

    @functools.cached_property
    def wanted(self):
        """What `both` gives of every product."""
        found = functools.partial(both, self.dtype, in_turn=np.matmul if self.whole else in_turn)
        dw = found(lambda times, x, dy: self.sample(times(x.T, dy)), self.x, self.dy)
        y, dx = (found(product, *a) for a in ((self.x, self.dense), (self.dy, self.dense.T)))
        return {"y": y, "dx": dx, "dW": dw, "fused dx": dx, "fused dW": dw}


def wide(x):
    return np.asarray(x, np.float64)


def product(times, x, w):
    return times(x, w)


def transposed(x):
    return np.swapaxes(x, -1, -2)


def in_turn(x, w):
    """x w, of which every term is added to the sum of all before it."""
    y = np.zeros((*x.shape[:-1], w.shape[-1]), x.dtype)
    for k in range(x.shape[-1]):
        y += x[..., k, None] * w[..., None, k, :]
    return y


def both(dtype, product, *operands, in_turn=in_turn):
    """The dense product in float64, and as it is summed in turn in the dtype that kernels sum in."""
    sums = jnp.promote_types(dtype, "float32")
    return product(np.matmul, *map(wide, operands)), product(in_turn, *(np.asarray(a, sums) for a in operands))


def assert_close(got, wanted, what="result"):
    """To the truth, as the dense product is, of `both`; what has 16 bits is rounded once."""
    truth, sums = wanted
    same = testing.assert_as_close_as_dense if got.dtype == sums.dtype else testing.assert_rounded_once
    same(got, truth, sums, what)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", mostly_slow(SHAPES), ids=str)
def test_products_and_gradients_match_the_dense_product(shape, block, dtype):
    cases = [Case(m, shape, block, 0.4, dtype) for m in BATCHES]
    operands = [(case.x, case.dy, case.blocks, vars(case.index)) for case in cases]
    program = jax.jit(lambda all: [products(case, *each) for case, each in zip(cases, all, strict=True)])
    for isa in each_isa_here():
        for m, case, got in zip(BATCHES, cases, program(operands), strict=True):
            for name, value in got.items():
                assert value.dtype == case.dtype
                assert_close(value, case.wanted[name], f"{name}, {isa}, batch {m}")


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 16), (32, 48), (48, 32), (16, 64)], ids=str)
def test_bfloat16_blocks_that_whole_tiles_cover_match_the_dense_product(block):
    batches = [15, 16, 17, 47, 70]
    cases = [Case(m, (192, 192), block, 0.3, "bfloat16") for m in batches]
    operands = [(case.x, case.dy, case.blocks, vars(case.index)) for case in cases]
    program = jax.jit(lambda all: [products(case, *each) for case, each in zip(cases, all, strict=True)])
    for isa in each_isa_here():
        for m, case, got in zip(batches, cases, program(operands), strict=True):
            for name, value in got.items():
                assert_close(value, case.wanted[name], f"{name}, {isa}, batch {m}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (5, 7)], ids=str)
def test_bias_and_activation_come_before_the_rounding(isa, block, activation, dtype):
    case = Case(19, (40, 50), block, 0.5, dtype)
    y = ck.spmm(case.x, case.blocks, case.index, **case.sizes, bias=case.bias, activation=activation)

    def whole(times, x, w, bias):
        return np.asarray(getattr(jax.nn, activation)(times(x, w) + bias))

    assert_close(y, both(dtype, whole, case.x, case.dense, case.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 64, 64), (4, 16, 24), (3, 5, 7), (2, 130, 33)], ids=str)
def test_block_diagonal_products_match_those_of_every_block(sizes, dtype):
    n, i, o = sizes
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal(sizes), dtype)
    operands = [
        (jnp.asarray(rng.standard_normal((m, n * i)), dtype), jnp.asarray(rng.standard_normal((m, n * o)), dtype))
        for m in BATCHES
    ]

    @jax.jit
    def program(operands, w):
        return [
            (
                ck.block_diag_matmul(x, w),
                ck.block_diag_matmul(dy, w, transposed=True),
                ck.block_diag_outer(x, dy, n),
            )
            for x, dy in operands
        ]

    for isa in each_isa_here():
        for m, (x, dy), (y, dx, dw) in zip(BATCHES, operands, program(operands, w), strict=True):
            x, y, dx, dy = (np.reshape(a, (m, n, a.shape[1] // n)).swapaxes(0, 1) for a in (x, y, dx, dy))
            for name, value, *ab in (("y", y, x, w), ("dx", dx, dy, transposed(w)), ("dW", dw, transposed(x), dy)):
                assert_close(value, both(dtype, product, *ab), f"{name}, {isa}, batch {m}")


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (8, 8)], ids=str)
def test_empty_lines_are_zero_and_full_ones_dense(isa, block, density):
    case = Case(33, (96, 80), block, density, "float32")
    y = ck.spmm(case.x, case.blocks, case.index, **case.sizes)
    assert_close(y, case.wanted["y"])


@pytest.mark.parametrize(
    "m, shape, block",
    [(200, (1000, 900), (1, 1)), (200, (1000, 900), (32, 32)), (27_000, (160, 16), (1, 1)), (130, (24, 2070), (1, 1))],
    ids=["single entries", "blocks", "a batch of several rounds", "a last slice of few entries"],
)
def test_large_problems_are_right_the_same_bits_again_and_of_whole_numbers_exact(m, shape, block):
    for whole in (True, False):
        case = Case(m, shape, block, 0.2, "float32", whole)
        for isa in each_isa_here():
            got, again = (products(case, case.x, case.dy, case.blocks, vars(case.index)) for _ in range(2))
            for name, value in got.items():
                assert_close(value, case.wanted[name], f"{name}, {isa}")
                assert np.array_equal(value, again[name])
                assert not whole or np.array_equal(value, case.wanted[name][0])


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


def of_16_bits(index):
    return with_(index, row_index=index.row_index.astype(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_index_of_16_bits_gives_the_same_bits(dtype):
    """Read as it is by a product of one row, widened for all else."""
    cases = [Case(m, (300, 70), (1, 1), 0.3, dtype) for m in (0, 1, 2, 17)]

    def finished(case, x, blocks, index):
        index, finish = types.SimpleNamespace(**index), {"bias": case.bias, "activation": "relu"}
        return {"finished y": ck.spmm(x, blocks, index, **case.sizes, **finish)}

    @jax.jit
    def program(all):
        return [
            products(case, x, dy, blocks, index) | finished(case, x, blocks, index)
            for case, (x, dy, blocks, index) in zip(cases, all, strict=True)
        ]

    def relu(times, x, w, bias):
        return np.maximum(times(x, w) + bias, 0)

    wanted = [case.wanted | {"finished y": both(dtype, relu, case.x, case.dense, case.bias)} for case in cases]
    for isa in each_isa_here():
        wide, narrow = (
            program([(case.x, case.dy, case.blocks, vars(change(case.index))) for case in cases])
            for change in (with_, of_16_bits)
        )
        for case, true, found, same in zip(cases, wanted, narrow, wide, strict=True):
            for name, value in found.items():
                assert_close(value, true[name], f"{name}, {isa}, batch {len(case.x)}")
                assert np.array_equal(value, same[name])


def test_a_bad_index_of_16_bits_is_an_error_with_its_numbers(isa):
    case = Case(200, (64, 64), (1, 1), 0.5, "float32")
    for value in (64, 2**16 - 1):
        bad = of_16_bits(with_(case.index, row_index=first_set_to(case.index.row_index, value)))
        for rows in (1, 64, 200):  # as it is, and widened
            with pytest.raises(Exception, match=rf"index {value} of entry 0 is not in \[0, 64\)"):
                jax.block_until_ready(ck.spmm(case.x[:rows], case.blocks, bad, **case.sizes))


def test_bad_shapes_and_dtypes_are_errors_with_their_numbers():
    case = Case(8, (64, 48), (8, 8), 0.5, "float32")
    with pytest.raises(Exception, match=r"x has shape \[8, 48\], needs \[8, 64\]"):
        jax.block_until_ready(ck.spmm(case.dy, case.blocks, case.index, **case.sizes))
    with pytest.raises(Exception, match="blocks is bfloat16, needs float32"):
        halves = case.blocks.astype(jnp.bfloat16)
        jax.block_until_ready(ck.spmm(case.x, halves, case.index, **case.sizes))
    with pytest.raises(Exception, match="the index is another dtype, needs int32"):
        longs = with_(case.index, row_index=case.index.row_index.astype(np.int64))
        jax.block_until_ready(ck.spmm(case.x, case.blocks, longs, **case.sizes))


def test_vmap_maps_one_product_at_a_time():
    case = Case(8, (32, 24), (1, 1), 0.5, "float32")
    xs = jnp.stack([case.x, 2 * case.x])
    ys = jax.vmap(lambda x: ck.spmm(x, case.blocks, case.index, **case.sizes))(xs)
    assert_close(ys[1], both("float32", product, 2 * case.x, case.dense))


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_can_fail(dtype):
    case = Case(5, (64, 64), (1, 1), 0.5, dtype)
    y = np.asarray(case.wanted["y"][0], case.dtype)
    assert_close(y, case.wanted["y"])
    for factor in (0, 1 + 8 * float(jnp.finfo(dtype).eps), np.nan):
        with pytest.raises(AssertionError, match="off by"):
            assert_close(np.asarray(wide(y) * factor, case.dtype), case.wanted["y"])


def test_an_instruction_set_that_is_misspelt_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CPU_ISA", "avx513")
    before = ck.isa()
    assert "JAXSPARSE_CPU_ISA is 'avx513'" in (_library.why_not_opened.__wrapped__() or "")
    assert ck.isa() == before
    monkeypatch.setenv("JAXSPARSE_CPU_ISA", before)
    assert _library.why_not_opened.__wrapped__() is None


def test_every_product_of_the_library_is_a_function_and_others_are_refused_by_name():
    assert set(_library.products()) == {name for name in ck.__all__ if hasattr(_xla, name)} - {"why_not"}
    assert "there is no kernel n_m_sddmm; there are spmm, sddmm," in (
        ck.why_not("n_m_sddmm", "float32", (1, 1), "cpu") or ""
    )
