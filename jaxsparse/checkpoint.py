"""Arrays and patterns in one file in the safetensors format, written so that a kill leaves the old file or the new one.

The format is a JSON header and raw bytes, so that it is written here and no package is needed; any safetensors reader
opens the files. A pattern is stored as its col_ptr and row_index, from which the rest follows; its sizes, a format tag
with a version, and a SHA-256 of everything stand in the header. The digest finds damage, it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse.formats import BlockPattern

FORMAT, VERSION = "jaxsparse", 1
_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
}
_DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(path: str | os.PathLike, tree: dict[str, Any]) -> None:
    """Writes a dict, or nested dicts, of arrays and `BlockPattern`s to one file; nested keys are joined by dots.

    The bytes go to `<path>.partial`, to the disk, and then into place at one stroke: a process that is killed leaves
    the previous file whole, and at most a partial one beside it, which the next save overwrites.

    Args:
      path: the file; its folder must exist.
      tree: arrays of any library that NumPy reads; a number is an array without dimensions. Flax makes such a dict of
        an optimizer's state: `flax.serialization.to_state_dict(opt_state)`.
    Raises:
      ValueError: for a key that is no string, is empty or holds a dot, and for a dtype that the format lacks.
    """
    arrays, patterns, empty = {}, {}, []
    for name, value in _flatten(tree):
        if isinstance(value, BlockPattern):
            patterns[name] = {"shape": value.shape, "block": value.block, "transposed": value.transposed}
            arrays |= {f"{name}.{part}": np.asarray(getattr(value, part)) for part in ("col_ptr", "row_index")}
        elif isinstance(value, dict):  # Optax has states without arrays
            empty.append(name)
        else:
            arrays[name] = np.asarray(value)
    # Wide entries first: every array then starts at a multiple of its own size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end, digest = {}, 0, hashlib.sha256()
    for name in order:
        a = arrays[name]
        if a.dtype not in _NAMES:
            raise ValueError(f"{name} is {a.dtype}, which safetensors has no name for; it has {', '.join(_DTYPES)}.")
        header[name] = {"dtype": _NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [end, end + a.nbytes]}
        end += a.nbytes
    about = {"format": FORMAT, "version": str(VERSION), "sha256": "0" * 64}
    about |= {"patterns": json.dumps(patterns), "empty": json.dumps(empty)}
    chunks = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data for name in order]
    for chunk in (_encode(about, header), *chunks):
        digest.update(chunk)
    _replace(Path(path), [_encode({**about, "sha256": digest.hexdigest()}, header), *chunks])


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save` wrote: the same nested dicts, of NumPy arrays and of `BlockPattern`s.

    Raises:
      ValueError: with the reason, for a file that is truncated or was changed, is no safetensors file or not one of
        ours, or is of a newer version.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = bytearray(path.stat().st_size)  # writable, so that the arrays are too
        file.readinto(data)
    try:
        arrays, about = _decode(data)
        arrays |= {name: {} for name in json.loads(about["empty"])}
        for name, sizes in json.loads(about["patterns"]).items():
            arrays[name] = _pattern(arrays.pop(f"{name}.col_ptr"), arrays.pop(f"{name}.row_index"), sizes)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read: its header lacks, or misstates, {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    return _nest(arrays)


# ---- bytes -----------------------------------------------------------------------------------------------


def _encode(about: dict[str, str], header: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _decode(data: bytearray) -> tuple[dict[str, Any], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + length:
        raise ValueError(f"it is truncated: the header should end at byte {8 + length}, the file at {len(data)}.")
    try:
        header = json.loads(data[8 : 8 + length])
        about = header.pop("__metadata__", {})
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"its header is no JSON object ({error}): it was changed, or is no safetensors file."
        ) from None
    if about.get("format") != FORMAT:
        raise ValueError(f"its format tag is {about.get('format')!r}, not {FORMAT!r}: jaxsparse didn't write it.")
    if not about["version"].isdecimal() or int(about["version"]) > VERSION:
        raise ValueError(f"it is of version {about['version']}, and this jaxsparse reads up to {VERSION}: update it.")
    body, end = memoryview(data)[8 + length :], max((info["data_offsets"][1] for info in header.values()), default=0)
    if len(body) != end:
        what = "truncated" if len(body) < end else "too long"
        raise ValueError(f"it is {what}: its arrays take {end} bytes, but {len(body)} follow the header.")
    digest = hashlib.sha256(_encode({**about, "sha256": "0" * 64}, header))
    digest.update(body)
    if digest.hexdigest() != about["sha256"]:
        raise ValueError("its SHA-256 does not match its content: it was damaged or changed after it was written.")
    return {name: _array(name, info, body) for name, info in header.items()}, about


def _array(name: str, info: dict[str, Any], body: memoryview) -> np.ndarray:
    dtype, (start, end) = _DTYPES[info["dtype"]], info["data_offsets"]
    if end - start != dtype.itemsize * math.prod(info["shape"]):
        raise ValueError(f"{name} of shape {info['shape']} in {info['dtype']} does not take {end - start} bytes.")
    return np.frombuffer(body[start:end], np.uint8).view(dtype).reshape(info["shape"])


def _replace(path: Path, chunks: list) -> None:
    """Writes a file beside `path`, waits until the disk has it, and renames it; then the folder is synchronised too."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- trees -----------------------------------------------------------------------------------------------


def _flatten(tree: dict[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "." in key or key == "__metadata__":
            raise ValueError(f"the key {key!r} under {prefix or 'the top'!r} must be a string without a dot.")
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(flat):
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = flat[name]
    return tree


def _pattern(col_ptr: np.ndarray, row_index: np.ndarray, sizes: dict[str, Any]) -> BlockPattern:
    """The pattern of its two stored arrays; `from_indices` checks them and computes the others."""
    shape, block = tuple(sizes["shape"]), tuple(sizes["block"])
    if sizes["transposed"]:
        shape, block = shape[::-1], block[::-1]
    cols = np.repeat(np.arange(len(col_ptr) - 1), np.diff(col_ptr))
    pattern = BlockPattern.from_indices(row_index, cols, shape=shape, block=block)
    return pattern.T if sizes["transposed"] else pattern
