"""A tree out of a file put into the containers of a target, which it must fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse._indices import Index
from jaxsparse.checkpoint.trees import Path, is_variable, opened, shown, type_name
from jaxsparse.formats import PATTERNS, BlockPattern, NMPattern


def fill(target: Any, tree: Any, place: Callable[[Any, Any], Any], path: Path = ()) -> Any:
    """What `build` made, in the containers of `target`, once keys, shapes and dtypes are found to be the same.

    Args:
      place: (array, target's array) -> the array as the target has it: of its library, on its device.
    Raises:
      ValueError: with the path, for what only one of them has, and for what differs.
    """
    if is_variable(target):
        return target.replace(fill(target.get_value(), tree, place, path))
    wanted = opened(target, path)
    if wanted is None:
        return _fill_leaf(target, tree, place, path)
    got = opened(tree, path)
    if got is None:
        raise ValueError(f"{shown(path)} is {_what(tree)} in the file, but the target has a {type_name(target)} there.")
    _check_same_keys(wanted.keys, got.keys, path)
    found = dict(zip(got.keys, got.children, strict=True))
    pairs = zip(wanted.keys, wanted.children, strict=True)
    return wanted.rebuilt([fill(child, found[key], place, (*path, key)) for key, child in pairs])


def _check_same_keys(wanted: list[Any], got: list[Any], path: Path) -> None:
    def missing(keys: list[Any], others: list[Any]) -> str:
        known = {(type(key), key) for key in others}  # 1, True and 1.0 are one key to Python
        return ", ".join(shown((*path, key)) for key in keys if (type(key), key) not in known)

    lacks, extra = missing(wanted, got), missing(got, wanted)
    if lacks or extra:
        parts = [f"the file lacks {lacks}"] * bool(lacks) + [f"the target lacks {extra}, which the file has"] * bool(
            extra
        )
        raise ValueError(f"the file does not fit the target: {'; '.join(parts)}.")


def _fill_leaf(target: Any, leaf: Any, place: Callable[[Any, Any], Any], path: Path) -> Any:
    if isinstance(target, BlockPattern) and isinstance(leaf, BlockPattern):
        return _fill_pattern(target, leaf, place, path)
    if isinstance(target, NMPattern) and isinstance(leaf, NMPattern):
        _check_same(("shape", "n", "m", "transposed"), target, leaf, path)
        return dataclasses.replace(leaf, bits=fill(target.bits, leaf.bits, place, (*path, "bits")))
    number = type(target) in (bool, int, float) and hasattr(leaf, "dtype") and not jnp.shape(leaf)
    if number and type(leaf.item()) is type(target):  # so did version 1 save numbers
        return leaf.item()
    arrays = [hasattr(a, "dtype") and hasattr(a, "shape") for a in (target, leaf)]
    if all(arrays):
        same = (*target.shape, _dtype(target)) == (*leaf.shape, _dtype(leaf))
    else:
        same = not any(arrays) and type(target) is type(leaf) and not isinstance(leaf, PATTERNS)
    if not same:
        raise ValueError(f"{shown(path)} is {_what(leaf)} in the file, but {_what(target)} in the target.")
    return place(leaf, target) if all(arrays) else leaf


def _fill_pattern(target: BlockPattern, pattern: BlockPattern, place: Callable[[Any, Any], Any], path: Path) -> Any:
    _check_same(("shape", "block", "transposed"), target, pattern, path)
    fields = {}
    for name in Index._fields:
        got, like = getattr(pattern, name), getattr(target, name)
        if name == "row_index" and {str(getattr(a, "dtype", "")) for a in (got, like)} == {"int32", "uint16"}:
            got = np.asarray(got).astype(like.dtype)  # indices are the same numbers in either
        fields[name] = fill(like, got, place, (*path, name))
    return BlockPattern.of_index(Index(**fields), pattern.shape, pattern.block, pattern.transposed)


def _check_same(names: tuple[str, ...], target: Any, pattern: Any, path: Path) -> None:
    for name in names:
        got, want = getattr(pattern, name), getattr(target, name)
        if got != want:
            raise ValueError(f"{shown(path)} is of {name} {got} in the file, but of {name} {want} in the target.")


def place(a: Any, like: Any) -> Any:
    """An array as the target has it: of NumPy, or of JAX and on its devices."""
    if isinstance(like, (np.ndarray, np.generic)):
        return np.asarray(a) if isinstance(like, np.ndarray) else np.asarray(a)[()]
    a = a if isinstance(a, jax.Array) else jnp.array(a)
    pinned = getattr(like, "committed", True) and getattr(like, "sharding", None) is not None
    return jax.device_put(a, like.sharding) if pinned else a


def _what(leaf: Any) -> str:
    if isinstance(leaf, PATTERNS):
        return repr(leaf)
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{_dtype(leaf)} of shape {tuple(leaf.shape)}"
    return f"a {type_name(leaf)}" if leaf is not None else "None"


def _dtype(a: Any) -> str:
    return str(a.dtype).removeprefix("torch.")
