"""Matrix Market and `.smtx`, matrices as text.

They are read here, as `scipy.io.mmread` of SciPy 1.17.1 can end the process on a damaged file.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxsparse._indices import by_column, lines_of
from jaxsparse.files._limits import check_sizes
from jaxsparse.files.weights import SparseMatrix
from jaxsparse.formats import BlockPattern
from jaxsparse.formats.interop import from_coordinates

_SMTX = re.compile(rb"\s*\d+\s*,\s*\d+\s*,\s*\d+")
_MIRRORED = {"symmetric": 1, "hermitian": 1, "skew-symmetric": -1}


class _Header(NamedTuple):
    layout: str  # "coordinate", or "array", which states every number
    field: str
    symmetry: str
    rows: int
    cols: int
    entries: int  # of an array, its numbers


def read_matrix_market(path: Path) -> SparseMatrix:
    with path.open("rb") as file:
        header = _header(file)
        body = file.read()
    in_a_line = {"array": 1, "coordinate": 2 if header.field == "pattern" else 3}[header.layout]
    numbers = header.entries * in_a_line
    if 2 * numbers > len(body) + 1:
        raise ValueError(f"it states {header.entries} entries, more than {len(body)} bytes can hold.")
    check_sizes(header.rows, header.cols, len(body))
    found = _numbers(body, np.float64 if header.field in ("real", "double") else np.int64)
    if found.size != numbers:
        raise ValueError(f"{header.entries} entries take {numbers} numbers, and {found.size} follow the header.")
    row, col, data = (_entries_of_array if header.layout == "array" else _entries_of_lines)(found, header)
    if header.symmetry in _MIRRORED:
        row, col, data = _mirrored(row, col, data, _MIRRORED[header.symmetry])
    return SparseMatrix(*from_coordinates(row, col, data, (header.rows, header.cols), (1, 1)))


def _header(file) -> _Header:
    words = file.readline(1024).decode("ascii", "replace").lower().split()
    layout, field, symmetry = words[2:] if len(words) == 5 and words[1] == "matrix" else ("", "", "")
    known = field in ("real", "double", "integer", "pattern") and (symmetry == "general" or symmetry in _MIRRORED)
    if layout not in ("coordinate", "array") or not known:
        raise ValueError(
            f"its first line is {' '.join(words)!r}, and must be %%MatrixMarket matrix, coordinate or array, a field "
            "(real, integer or pattern: no product here multiplies complex values) and a symmetry."
        )
    line = file.readline(4096)
    while line.startswith(b"%") or line.isspace():
        line = file.readline(4096)
    words = line.split()
    if len(words) != (3 if layout == "coordinate" else 2) or not all(word.isdigit() for word in words):
        raise ValueError(f"its line of sizes is {line[:80].decode('ascii', 'replace')!r}: integers are needed.")
    rows, cols, *entries = (int(word) for word in words)
    if symmetry != "general" and rows != cols:
        raise ValueError(f"a {symmetry} matrix is square, and this one is ({rows}, {cols}).")
    half = rows * (rows + _MIRRORED.get(symmetry, 0)) // 2
    return _Header(layout, field, symmetry, rows, cols, *(entries or [rows * cols if symmetry == "general" else half]))


def _entries_of_lines(numbers, header: _Header) -> tuple[NDArray, NDArray, NDArray]:
    lines = numbers.reshape(header.entries, -1)
    at = lines[:, :2]
    if (at != np.floor(at)).any() or not (np.abs(at) < 2**53).all():
        raise ValueError("a row or a column is no integer.")
    row, col = at.T.astype(np.int64) - 1
    return row, col, lines[:, 2] if lines.shape[1] == 3 else np.ones(len(lines), np.int64)


def _entries_of_array(numbers, header: _Header) -> tuple[NDArray, NDArray, NDArray]:
    """What is not zero. An array is written column by column; of a symmetric one, what is not above the diagonal."""
    if header.symmetry == "general":
        col, row = np.divmod(np.arange(header.entries), header.rows)
    else:
        col, row = np.triu_indices(header.rows, 1 if header.symmetry == "skew-symmetric" else 0)
    kept = numbers != 0
    return row[kept], col[kept], numbers[kept]


def _mirrored(row, col, data, sign: int) -> tuple[NDArray, NDArray, NDArray]:
    off = row != col
    if (row < col).any() or (sign == -1 and not off.all()):
        raise ValueError("an entry stands above the diagonal (of a skew-symmetric matrix: on it), which it implies.")
    again = np.concatenate([row, col[off]]), np.concatenate([col, row[off]])
    return *again, np.concatenate([data, sign * data[off]])


def is_smtx(head: bytes) -> bool:
    """Whether a file begins as `.smtx` does: rows, columns and entries, with commas between."""
    return _SMTX.match(head) is not None


def read_smtx(path: Path) -> SparseMatrix:
    sizes, _, body = path.read_bytes().partition(b"\n")
    try:
        rows, cols, stored = (int(word) for word in sizes.split(b","))
    except ValueError:
        raise ValueError(f"its first line must be rows, columns and entries, got {sizes[:80]!r}.") from None
    if 2 * (rows + 1 + stored) > len(body) + 1:
        raise ValueError(f"it states {rows} rows with {stored} entries, more than {len(body)} bytes can hold.")
    check_sizes(rows, cols, len(body))
    numbers = _numbers(body, np.int64)
    if numbers.size != rows + 1 + stored:
        raise ValueError(
            f"{rows} rows with {stored} entries take {rows + 1} offsets and {stored} columns, {rows + 1 + stored} "
            f"integers; {numbers.size} follow the first line."
        )
    ptr, index = numbers[: rows + 1], numbers[rows + 1 :]
    row = lines_of(ptr, rows, index, index, "its line of offsets")
    order = by_column(row, index, (rows, cols))
    return SparseMatrix(BlockPattern.from_indices(row[order], index[order], shape=(rows, cols)), None)


def _numbers(text: bytes, dtype) -> NDArray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how NumPy says that it met something else than a number
        try:
            return np.fromstring(text, dtype, sep=" ")
        except (DeprecationWarning, ValueError):
            what = "integers" if dtype == np.int64 else "numbers"
            raise ValueError(f"something else than {what} follows the header.") from None
