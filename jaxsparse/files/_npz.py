"""SciPy's `.npz` files."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from jaxsparse.files._limits import check_sizes
from jaxsparse.files.weights import SparseMatrix
from jaxsparse.formats import BlockPattern

_DEFLATE = 1032  # bytes that one compressed byte can stand for at most (zlib's technical details)
_HEADER = 2**16  # bytes that a NumPy header may have


def read(path: Path) -> SparseMatrix:
    import scipy.sparse

    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as file:
            shapes = {info.filename.removesuffix(".npy"): _stated_shape(file, info, size) for info in file.infolist()}
        if not {"format", "shape", "data"} <= shapes.keys():
            raise ValueError(f"it holds {', '.join(shapes) or 'nothing'}; SciPy's have format, shape and data.")
        with np.load(path, allow_pickle=False) as arrays:
            rows, cols = (int(n) for n in arrays["shape"])
        check_sizes(rows, cols, sum(math.prod(shape) for shape in shapes.values()))
        matrix = scipy.sparse.load_npz(path)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"it is a damaged archive: {error}") from None
    return SparseMatrix(*BlockPattern.from_scipy(matrix))


def _stated_shape(file: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> tuple[int, ...]:
    """The shape in an array's header, which must fit the bytes of the archive."""
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE
    if info.compress_size > size or info.file_size > ratio * info.compress_size + 64:
        raise ValueError(
            f"{info.filename} states {info.file_size} bytes, more than {info.compress_size} can stand for."
        )
    with file.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of version {version} of NumPy's format, not 1.0 or 2.0.")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(member, max_header_size=_HEADER)
        if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
            raise ValueError(f"{info.filename} states {dtype} {shape}, which {info.file_size} bytes don't hold.")
    return shape
