"""Files of `torch.save`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse.files import layouts
from jaxsparse.files._limits import check_sizes
from jaxsparse.files.weights import SparseMatrix

# What torch.load raises for damage and for classes that it does not trust.
_ERRORS = (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OSError, ImportError)


def is_archive(path: Path) -> bool:
    """Whether a zip archive is one of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return False


def read(path: Path) -> dict[str, Any]:
    """Every tensor by its path in what was saved; a sparse one, which is (out, in) as weights are, as (in, out)."""
    import torch

    size = path.stat().st_size
    _check_archive(path, size)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        named = dict(_leaves("", saved))
        return {name: _converted(name, t, size) if isinstance(t, torch.Tensor) else t for name, t in named.items()}
    except _ERRORS as error:
        raise ValueError(f"torch.load(weights_only=True) says: {error}") from None


def _check_archive(path: Path, size: int) -> None:
    """torch stores bytes as they are: what an archive states then is what it has."""
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
    odd = [p.filename for p in parts if p.compress_type != zipfile.ZIP_STORED or p.file_size != p.compress_size]
    if odd or sum(p.file_size for p in parts) > size:
        raise ValueError(f"it states more bytes than it has, or is compressed, as torch writes none: {odd[:1]}.")


def _leaves(path: str, node: Any):
    """(path, leaf) of nested containers, joined by dots."""
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        yield path or "matrix", node
        return
    for key, child in items:
        yield from _leaves(f"{path}.{key}" if path else str(key), child)


def _converted(name: str, t: Any, size: int) -> Any:
    try:
        if layouts.layout_of(t) != "strided":
            if t.ndim == 2:
                check_sizes(int(t.shape[0]), int(t.shape[1]), size)
            pattern, values, order = layouts.place(t)
            values = _array(values, size)[order]
            return SparseMatrix(pattern, values if values.ndim == 1 else _blocks(values, pattern))
        return _array(t, size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _blocks(values: np.ndarray, pattern) -> np.ndarray:
    return values.swapaxes(1, 2).reshape(pattern.values_shape)


def _array(t: Any, size: int) -> np.ndarray:
    """A NumPy array of the same numbers. An expanded tensor may state more of them than the file has."""
    t = t.detach().resolve_conj().resolve_neg()
    if t.numel() * t.element_size() > size:
        raise ValueError(f"it states {tuple(t.shape)}, {t.numel() * t.element_size()} bytes, in a file of {size}.")
    kind = str(t.dtype).removeprefix("torch.")
    if kind == "bfloat16" or kind.startswith("float8"):  # NumPy's own types have none of them
        import torch

        return t.contiguous().view(torch.uint8 if t.element_size() == 1 else torch.int16).numpy().view(jnp.dtype(kind))
    return t.numpy()
