"""Patterns out of the plain dicts that savers make of them, named as JAX names the leaves, or as Flax the fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse import _indices
from jaxsparse._indices import Index
from jaxsparse._sizes import check_sizes, grid_of
from jaxsparse.formats import BlockPattern, NMPattern, Pattern

N_M_NAMES = ("bits", "n", "m", "shape", "transposed")  # of NMPattern, as Flax names them
_SIZES = ("shape", "block", "transposed")
_BITS = re.compile(r"bits_(\d+)of(\d+)_(\d+)x(\d+)(_T)?")
_LEAF = re.compile(rf"({'|'.join(Index._fields)})_(\d+)x(\d+)_by_(\d+)x(\d+)(_T)?")


def is_state(tree: Any) -> bool:
    """Whether this is a dict that a saver made of a pattern, by the names in it."""
    if not isinstance(tree, Mapping) or not tree:
        return False
    return set(tree) == {*Index._fields, *_SIZES} or all(isinstance(k, str) and _LEAF.fullmatch(k) for k in tree)


def from_state(state: Mapping[str, Any]) -> BlockPattern:
    """`BlockPattern.from_state`, which says what is checked."""
    if not is_state(state):
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a pattern is a dict of its arrays, got {type(state).__name__}.")
        lacks = [name for name in (*Index._fields, *_SIZES) if name not in state]
        raise ValueError(
            f"this is no state of a pattern: of the names it needs it lacks {lacks}, and has {list(state)}."
        )
    arrays, sizes = _by_fields(state) if "col_ptr" in state else _by_leaf_names(state)
    shape, block, transposed = sizes
    shape, block = check_sizes(shape, block)
    index = Index(*(arrays[name] for name in Index._fields))
    grid = grid_of(shape, block)
    _indices.check_index(index, (grid[1], grid[0]) if transposed else grid)
    # Copies, as jnp.asarray may share memory that somebody writes into.
    made = {
        name: jnp.array(a, None if name == "row_index" and a.dtype == np.uint16 else np.int32)
        for name, a in arrays.items()
    }
    return BlockPattern.of_index(Index(**made), shape, block, transposed)


def is_any_state(tree: Any) -> bool:
    """Whether a saver made this dict of a pattern of either class."""
    return is_state(tree) or is_n_m_state(tree)


def from_any_state(state: Mapping[str, Any]) -> Pattern:
    """The pattern of either class, checked."""
    return from_n_m_state(state) if is_n_m_state(state) else from_state(state)


def is_n_m_state(tree: Any) -> bool:
    """Whether this is a dict that a saver made of an `NMPattern`, by the names in it."""
    return isinstance(tree, Mapping) and (set(tree) == set(N_M_NAMES) or _bits_leaf(tree) is not None)


def from_n_m_state(state: Mapping[str, Any]) -> NMPattern:
    """The `NMPattern` of such a dict, checked as `NMPattern.from_bits` says."""
    match = _bits_leaf(state)
    if match is None:
        n, m, rows, cols, view = (int(size) for name in N_M_NAMES[1:] for size in np.asarray(state[name]).reshape(-1))
        bits = state["bits"]
    else:
        n, m, rows, cols, view = *map(int, match.groups()[:4]), match[5] is not None
        (bits,) = state.values()
    return NMPattern.from_bits(bits, n=n, m=m, shape=(rows, cols), transposed=bool(view))


def _bits_leaf(state: Mapping[str, Any]) -> re.Match | None:
    """The sizes in the name of the only leaf."""
    names = list(state)
    return _BITS.fullmatch(names[0]) if len(names) == 1 and isinstance(names[0], str) else None


def _by_leaf_names(state: Mapping[str, Any]):
    found = {key: match.groups() for key in state if (match := _LEAF.fullmatch(key))}
    sizes = {groups[1:] for groups in found.values()}
    if len(sizes) != 1 or {groups[0] for groups in found.values()} != set(Index._fields):
        raise ValueError(f"these are not the {len(Index._fields)} arrays of one pattern: {sorted(state)}.")
    rows, cols, i, o, view = sizes.pop()
    arrays = {groups[0]: state[key] for key, groups in found.items()}
    return arrays, ((int(rows), int(cols)), (int(i), int(o)), view is not None)


def _by_fields(state: Mapping[str, Any]):
    shape, block, transposed = (np.asarray(state[name]).reshape(-1).tolist() for name in _SIZES)
    if len(transposed) != 1:
        raise ValueError(f"transposed is one truth value, got {transposed}.")
    return {name: state[name] for name in Index._fields}, (shape, block, bool(transposed[0]))
