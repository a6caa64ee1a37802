"""Sparse matrices from the files of other libraries: one function, which goes by the content, not by the name.

A file is checked before memory is taken: what its header says must fit the bytes that are there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxsparse.files import _npz, _text, _torch
from jaxsparse.files.weights import SparseMatrix, gather

__all__ = ["SparseMatrix", "gather", "read"]


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the sparse matrices, and the other arrays, of a file that another library wrote.

    | content | what comes back |
    | --- | --- |
    | SciPy's `.npz`: CSR, CSC, BSR, COO, DIA | {"matrix": ..}, (rows, cols) as in the file |
    | Matrix Market, every field but complex and every symmetry | the same; of an array what is not zero |
    | `.smtx` of the Deep Learning Matrix Collection | the same, with None for values: the format has none |
    | safetensors, or a folder of such files | every array by its name; sparse weights as `gather` makes them |
    | `torch.save` (`.pt`, `.bin`), or a folder of `pytorch_model*.bin` | the same; names are joined by dots |

    torch reads its files itself, with weights_only=True, so that no code in them runs. A sparse tensor of torch is
    (out, in), as weights are there, and becomes a matrix (in, out); what is no tensor stays as it is.

    Entries that stand twice are summed, as SciPy does. Values keep their dtype, but for what JAX narrows.

    Args:
      path: a file, or the folder of a checkpoint in several files.
    Raises:
      ValueError: with the reason, for other content, and for a file that is damaged or states what it can't hold.
      ImportError: where SciPy, safetensors or torch is needed and not installed.
    Source: https://math.nist.gov/MatrixMarket/formats.html; Gale et al. 2020, arXiv:2006.10901, for `.smtx`.
    """
    path = Path(path)
    try:
        return _read(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return gather(_folder(path))
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04") and _torch.is_archive(path):
        return gather(_torch.read(path))
    if head.startswith(b"PK\x03\x04"):
        return {"matrix": _npz.read(path)}
    if head.lower().startswith(b"%%matrixmarket"):
        return {"matrix": _text.read_matrix_market(path)}
    if head[8:9] == b"{":
        return gather(_safetensors(path))
    if _text.is_smtx(head):
        return {"matrix": _text.read_smtx(path)}
    raise ValueError(
        "it is no SciPy .npz, no Matrix Market file, no .smtx, no safetensors file and no archive of torch.save. A "
        "compressed one (.gz) must be decompressed first; what torch before 1.6 wrote must be saved anew."
    )


def _folder(path: Path) -> dict[str, Any]:
    """All parts of a checkpoint."""
    for pattern, read_part in (("*.safetensors", _safetensors), ("pytorch_model*.bin", _torch.read)):
        parts = sorted(path.glob(pattern))
        if parts:
            return {name: a for part in parts for name, a in read_part(part).items()}
    raise ValueError("the folder holds no .safetensors file, and no pytorch_model*.bin.")


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
