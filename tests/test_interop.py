"""Matrices of SciPy and of JAX: there and back, and what is refused of them."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse as jsparse

from jaxsparse import BlockPattern, _indices, reference, spmm, testing
from jaxsparse.files import weights
from jaxsparse.formats import interop


@pytest.mark.parametrize("name", ["wide unstructured", "tall blocks of 32x16", "odd blocks of 7x5"])
def test_other_libraries_matrices_round_trip(name):
    case = next(c for c in testing.CASES if c.name == name)
    _, blocks, _, _ = testing.inputs(case, case.pattern, jnp.float32)
    for pattern in (case.pattern, case.pattern.T):
        dense = reference.densify(blocks, pattern)
        for to, back in (("to_scipy", "from_scipy"), ("to_bcoo", "from_bcoo"), ("to_bcsr", "from_bcsr")):
            matrix = getattr(pattern, to)(blocks)
            array = matrix.toarray() if to == "to_scipy" else np.asarray(matrix.todense())
            np.testing.assert_array_equal(array, dense)
            again, values = getattr(BlockPattern, back)(matrix)
            np.testing.assert_array_equal(reference.densify(values, again), dense)


FALLS = {  # what is done to the row pointers [0, 2, 4, 6, 8] of a matrix, and what is said
    "falls": ([0, 5, 4, 6, 8], "falls from 5 to 4 at position 2"),
    "falls below zero": ([0, 2, -1, 6, 8], "falls from 2 to -1 at position 2"),
    "starts late": ([1, 2, 4, 6, 8], "runs from 1 to 8, with 8 indices and 8 values"),
    "ends early": ([0, 2, 4, 6, 7], "runs from 0 to 7, with 8 indices"),
    "ends late": ([0, 2, 4, 6, 9], "runs from 0 to 9, with 8 indices"),
    "is short": ([0, 2, 4, 8], r"shape \(4,\), but 4 lines need 5 integers"),
    "is long": ([0, 2, 4, 6, 8, 8], r"shape \(6,\), but 4 lines need 5 integers"),
    "is of floats": ([0.0, 2.0, 4.0, 6.0, 8.0], "float64 of shape"),
}
CIRCLE = np.eye(4) + np.roll(np.eye(4), 1, axis=1)  # two entries in every row and column


@pytest.mark.parametrize("format", ["csr", "csc", "bsr", "bcsr"])
@pytest.mark.parametrize("name", FALLS)
def test_row_pointers_that_are_none_are_refused(format, name):
    ptr, message = FALLS[name]
    if format == "bcsr":
        matrix, back = jsparse.BCSR.fromdense(jnp.asarray(CIRCLE)), BlockPattern.from_bcsr
        assert back(matrix)[0].nnzb == 8
        matrix.indptr = np.asarray(ptr)
    else:
        size = {"blocksize": (2, 3)} if format == "bsr" else {}
        dense = np.kron(CIRCLE, np.ones((2, 3))) if size else CIRCLE
        matrix, back = getattr(scipy.sparse, f"{format}_array")(dense, **size), BlockPattern.from_scipy
        assert back(matrix)[0].nnzb == 8
        matrix.indptr = np.asarray(ptr)
    with pytest.raises(ValueError, match=f"the {format.upper()} matrix's indptr .*{message}"):
        back(matrix)


def changed(format, **arrays):
    """The matrix of CIRCLE, of blocks of (2, 3) in BSR, with other arrays in it."""
    if format in ("BCOO", "BCSR"):
        matrix = getattr(jsparse, format).fromdense(jnp.asarray(CIRCLE))
    elif format == "bsr":
        matrix = scipy.sparse.bsr_array(np.kron(CIRCLE, np.ones((2, 3))), blocksize=(2, 3))
    else:
        matrix = getattr(scipy.sparse, f"{format}_array")(CIRCLE)
    for name, array in arrays.items():
        setattr(matrix, name, array)
    return matrix


ONES, INDEX = np.ones(8), np.array([0, 1, 1, 2, 2, 3, 0, 3])
PAIRS = np.stack([np.arange(8) // 2, INDEX], 1)
MALFORMED = {  # format, arrays, and what is said of them
    "csr, too many values": ("csr", {"data": np.ones(9)}, "runs from 0 to 8, with 8 indices and 9 values"),
    "csr, too few indices": ("csr", {"indices": INDEX[:7]}, "with 7 indices and 8 values"),
    "csr, an index below": ("csr", {"indices": INDEX - 1}, "column index -1 at position 0 is outside 0 to 3"),
    "csr, an index beyond": ("csr", {"indices": INDEX + 2**32}, "column index 4294967296 at position 0"),
    "csr, NaN for an index": ("csr", {"indices": np.full(8, np.nan)}, "column indices must be integers, got float64"),
    "csr, values of two numbers": ("csr", {"data": np.ones((8, 2))}, r"8 entries .*values of shape \(8, 2\): one each"),
    "csc, an index beyond": ("csc", {"indices": INDEX + 1}, "row index 4 at position 5"),
    "bsr, an index beyond": ("bsr", {"indices": INDEX + 1}, "column index 4 at position 5"),
    "bsr, values of entries": ("bsr", {"data": ONES}, r"values have shape \(8,\), and must be \[blocks, i, o\]"),
    "bsr, blocks of nothing": ("bsr", {"data": np.ones((8, 0, 3))}, "blocks that divide its shape"),
    "bsr, other blocks": ("bsr", {"data": np.ones((8, 3, 3))}, r"\(8, 3, 3\).*divide its shape \(8, 12\)"),
    "coo, too many values": ("coo", {"data": np.ones(9)}, r"8 entries were given with values of shape \(9,\)"),
    "coo, too few values": ("coo", {"data": np.ones(7)}, r"8 entries were given with values of shape \(7,\)"),
    "coo, a column of values": ("coo", {"data": np.ones((8, 1))}, r"values of shape \(8, 1\)"),
    "coo, too few columns": ("coo", {"coords": (INDEX, INDEX[:7])}, r"of one length, got \(8,\) and \(7,\)"),
    "coo, an index below": ("coo", {"coords": (INDEX, INDEX - 1)}, "column index -1 at position 0"),
    "coo, fractions": ("coo", {"coords": (INDEX + 0.5, INDEX)}, "row indices must be integers, got float64"),
    "lil, values without columns": (
        "lil",
        {"rows": np.array([[0], [1], [2, 3], [3]], object)},
        "row 0 of the LIL .*1 ",
    ),
    "BCOO, too many values": ("BCOO", {"data": np.ones(9)}, r"9 values, .*shape \(9, 2\), got \(8, 2\)"),
    "BCOO, one index each": ("BCOO", {"indices": PAIRS[:, :1]}, r"shape \(8, 2\), got \(8, 1\)"),
    "BCOO, an index below": ("BCOO", {"indices": PAIRS - 1}, "row index -1 at position 0"),
    "BCOO, half a padding": ("BCOO", {"indices": np.where(PAIRS == 3, 4, PAIRS)}, "row index 4 at position 6"),
    "BCSR, too many values": ("BCSR", {"data": np.ones(9)}, "8 indices and 9 values"),
    "BCSR, too many indices": ("BCSR", {"indices": np.append(INDEX, 4)}, "9 indices and 8 values"),
    "BCSR, an index below": ("BCSR", {"indices": INDEX - 1}, "column index -1"),
    "BCSR, padding between": (
        "BCSR",
        {"indices": np.where(np.arange(8) == 2, 4, INDEX)},
        "runs from 0 to 8, with 7 ind",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_arrays_that_are_no_matrix_are_refused(name):
    format, arrays, message = MALFORMED[name]
    back = getattr(BlockPattern, f"from_{format.lower()}" if format[0] == "B" else "from_scipy")
    assert back(changed(format))[0].nnzb == 8
    with pytest.raises(ValueError, match=message):
        back(changed(format, **arrays))


@pytest.mark.parametrize("format", ["csr", "csc", "coo", "lil", "dok", "dia", "bsr"])
def test_every_format_of_scipy_is_read(format):
    matrix = getattr(scipy.sparse, f"{format}_array")(CIRCLE)
    pattern, values = BlockPattern.from_scipy(matrix)
    np.testing.assert_array_equal(pattern.to_dense(values), CIRCLE)


def test_blocks_of_one_entry_have_the_values_of_entries():
    pattern, values = BlockPattern.from_scipy(scipy.sparse.csr_array(CIRCLE).tobsr((1, 1)))
    assert (pattern.block, values.shape, pattern.values_shape) == ((1, 1), (8,), (8,))
    np.testing.assert_allclose(spmm(jnp.eye(4), values, pattern), CIRCLE)


def test_the_padding_of_jaxs_matrices_is_left_out():
    for kind, back in ((jsparse.BCOO, BlockPattern.from_bcoo), (jsparse.BCSR, BlockPattern.from_bcsr)):
        for spare in (0, 1, 7):
            pattern, values = back(kind.fromdense(jnp.asarray(CIRCLE), nse=8 + spare))
            assert pattern.nnzb == 8
            np.testing.assert_array_equal(pattern.to_dense(values), CIRCLE)
    half = jsparse.BCOO((jnp.ones(1), jnp.array([[4, 1]])), shape=(4, 4))
    with pytest.raises(ValueError, match="row index 4 .*outside 0 to 3"):
        BlockPattern.from_bcoo(half)


def test_an_unsorted_scipy_matrix_is_sorted_with_its_values():
    matrix = scipy.sparse.coo_array(([1.0, 2.0, 3.0], ([2, 0, 1], [1, 1, 0])), shape=(3, 2))
    pattern, values = BlockPattern.from_scipy(matrix)
    np.testing.assert_array_equal(pattern.to_dense(values), matrix.toarray())


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "bsr", "BCOO", "BCSR"])
def test_what_stands_twice_is_summed(kind):
    values, rows, cols = np.array([1.0, 2.0, 4.0, 8.0], np.float32), np.array([0, 0, 2, 0]), np.array([1, 1, 0, 0])
    want = np.array([[8, 3, 0], [0, 0, 0], [4, 0, 0]], np.float32)
    if kind == "coo":
        pattern, blocks = BlockPattern.from_scipy(scipy.sparse.coo_array((values, (rows, cols)), shape=(3, 3)))
    elif kind == "csr":
        raw = (values[[0, 1, 3, 2]], cols[[0, 1, 3, 2]], [0, 3, 3, 4])
        pattern, blocks = BlockPattern.from_scipy(scipy.sparse.csr_array(raw, shape=(3, 3)))
    elif kind == "csc":
        raw = (values[[2, 3, 0, 1]], rows[[2, 3, 0, 1]], [0, 2, 4, 4])
        pattern, blocks = BlockPattern.from_scipy(scipy.sparse.csc_array(raw, shape=(3, 3)))
    elif kind == "bsr":
        blocks = np.kron(values[[0, 1, 3, 2], None, None], np.ones((1, 2, 2), np.float32))
        raw, want = (blocks, cols[[0, 1, 3, 2]], [0, 3, 3, 4]), np.kron(want, np.ones((2, 2), np.float32))
        pattern, blocks = BlockPattern.from_scipy(scipy.sparse.bsr_array(raw, shape=(6, 6)))
    elif kind == "BCOO":
        raw = (jnp.asarray(values), jnp.stack([jnp.asarray(rows), jnp.asarray(cols)], 1))
        pattern, blocks = BlockPattern.from_bcoo(jsparse.BCOO(raw, shape=(3, 3)))
    else:
        raw = (jnp.asarray(values[[0, 1, 3, 2]]), jnp.asarray(cols[[0, 1, 3, 2]]), jnp.asarray([0, 3, 3, 4]))
        pattern, blocks = BlockPattern.from_bcsr(jsparse.BCSR(raw, shape=(3, 3)))
    assert pattern.nnzb == 3
    np.testing.assert_array_equal(pattern.to_dense(blocks), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_that_scipy_has_no_matrices_of_are_refused_by_their_dtype(dtype):
    for block in (1, 2):
        pattern = BlockPattern.banded((4, 4), 0, block)
        with pytest.raises(ValueError, match=rf"no matrices of {dtype.__name__}.*astype"):
            pattern.to_scipy(jnp.ones(pattern.values_shape, dtype))


def test_a_matrix_of_more_entries_than_int32_counts_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(_indices, "INT32_MAX", 7)
    monkeypatch.setattr(interop, "INT32_MAX", 7)
    for m in (scipy.sparse.csr_array(CIRCLE), scipy.sparse.csc_array(CIRCLE), scipy.sparse.coo_array(CIRCLE)):
        with pytest.raises(ValueError, match="8 entries are more than int32 can index"):
            BlockPattern.from_scipy(m)
    bits = {
        "bitmask": np.packbits(CIRCLE != 0, axis=1, bitorder="little"),
        "compressed": ONES,
        "shape": np.array([4, 4]),
    }
    with pytest.raises(ValueError, match="w: 8 entries are more than int32 can index"):
        weights.gather({f"w.{name}": a for name, a in bits.items()})
