"""Arrays and patterns in one file in the safetensors format, written so that a kill leaves the old file or the new one.

The format is a JSON header and raw bytes, so that it is written here and no package is needed; any safetensors reader
opens the files. The header's metadata hold a format tag with a version, the tree as JSON (containers, keys of their
types, numbers, the sizes of patterns, and the name of every array), and a SHA-256 of everything. The digest finds
damage, it is no signature. A pattern is stored as its col_ptr and row_index, from which the rest follows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsparse.checkpoint import targets, trees
from jaxsparse.checkpoint.trees import DTYPES, NAMES
from jaxsparse.formats import states

FORMAT, VERSION = "jaxsparse", 2


def save(path: str | os.PathLike, tree: Any) -> None:
    """Writes any tree of arrays and patterns to one file: `load` gives back every one of its leaves.

    Containers are mappings, lists, tuples, and whatever else JAX knows as a pytree: a Flax state, `TrainState`, an
    optimizer's state. Keys are strings, numbers, None, or tuples of them. Leaves are arrays of any library that NumPy
    reads, of any dtype that numbers have, patterns (stacks of them too), PRNG keys, numbers, strings and None.
    Fields that JAX calls static, as the functions of a `TrainState`, are no leaves: a target has them.

    The bytes go to `<path>.partial`, to the disk, and then into place at one stroke: a process that is killed leaves
    the previous file whole, and at most a partial one beside it, which the next save overwrites.

    Args:
      path: the file; its folder must exist.
      tree: an array at the path `['layers'][0]['kernel']` is `layers.0.kernel` to other readers of safetensors.
    Raises:
      ValueError: with the path and the type, for what can't be given back; nothing is written then.
    """
    arrays: trees.Arrays = {}
    write(path, trees.take_apart(tree, arrays, lambda leaf: leaf), arrays)


def load(path: str | os.PathLike, target: Any = None) -> Any:
    """Reads what `save` wrote.

    Args:
      target: a tree of the structure that was saved, as a fresh model's state, or what `jax.eval_shape` makes of it.
        None gives dicts, lists and tuples of NumPy arrays and patterns, under the keys that were saved.
    Returns:
      Without a target: mappings and classes as dicts, a class by the names of its fields, and an `nnx.State` as the
      pure dict that `nnx.update` takes. With one: its containers and static fields, and the leaves of the file, on the
      devices of its arrays; the target itself stays as it is.
    Raises:
      ValueError: with the reason, for a file that is truncated or was changed, is no safetensors file or not one of
        ours, or is of a newer version; with the path, where the target has other keys, shapes, dtypes or sizes.
    """
    tree = read(path, lambda a: a)
    return tree if target is None else targets.fill(target, tree, targets.place)


def restore_patterns(tree: Any) -> Any:
    """Makes `BlockPattern`s and `NMPattern`s again of the dicts that other savers make of them.

    Orbax without a target, and `flax.serialization.msgpack_restore`, give a pattern back as a dict of its arrays.

    Args:
      tree: what they gave, a pytree.
    Raises:
      ValueError: with the path, for a dict that is named as a pattern's but is none.
    """

    def restore(path, node):
        if not states.is_any_state(node):
            return node
        try:
            return states.from_any_state(node)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(restore, tree, is_leaf=states.is_any_state)


def write(path: str | os.PathLike, tree: Mapping[str, Any], arrays: trees.Arrays) -> None:
    """Writes a tree that was taken apart, as `save` says."""
    # Wide entries first: every array then starts at a multiple of its own size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end, digest = {}, 0, hashlib.sha256()
    for name in order:
        a = arrays[name]
        header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [end, end + a.nbytes]}
        end += a.nbytes
    about = {"format": FORMAT, "version": str(VERSION), "sha256": "0" * 64, "tree": json.dumps(tree)}
    chunks = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data for name in order]
    for chunk in (_encode(about, header), *chunks):
        digest.update(chunk)
    _replace(Path(path), [_encode({**about, "sha256": digest.hexdigest()}, header), *chunks])


def read(path: str | os.PathLike, make: Callable[[np.ndarray], Any]) -> Any:
    """The tree in a file, with what `make` makes of its arrays; ValueError as `load` says."""
    path = Path(path)
    with path.open("rb") as file:
        data = bytearray(path.stat().st_size)  # writable, so that the arrays are too
        file.readinto(data)
    try:
        arrays, about = _decode(data)
        if about["version"] == "1":
            tree = trees.names_to_nodes(arrays, json.loads(about["patterns"]), json.loads(about["empty"]))
        else:
            tree = json.loads(about["tree"])
        return trees.build(tree, arrays, make)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: its header lacks, or misstates, {error}.") from None
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from None


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
    dtype, (start, end) = DTYPES[info["dtype"]], info["data_offsets"]
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
