"""Functions of pytrees as single nodes of a graph that torch.compile or torch.export makes."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch import Tensor

from torch_bridge._errors import BridgeError
from torch_bridge._handles import FUNCTIONS

_STRUCTURES: dict[str, Any] = {}


def in_graph(handle: str, args: tuple, kwargs: dict) -> Any:
    """Calls a function by its handle, as one node of torch.compile's graph, which need not understand its inside."""
    outputs = _flat_in_graph(handle, args, kwargs)
    return _build(_structure(handle), outputs)


@torch.compiler.allow_in_graph
def _flat_in_graph(handle: str, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    outputs, tree = jax.tree.flatten(FUNCTIONS[handle].in_graph(_plain(args), _plain(kwargs)))
    _STRUCTURES[handle] = _spell(jax.tree.unflatten(tree, range(len(outputs))))
    return tuple(outputs)


@torch.compiler.assume_constant_result
def _structure(handle: str) -> Any:
    """What the call that has just been traced returns: a graph's node itself can return no dicts."""
    return _STRUCTURES[handle]


def _spell(tree: Any) -> Any:
    """A tree of numbers in nested tuples, the only containers that torch.compile takes for constants."""
    if isinstance(tree, dict):
        return "dict", tuple(tree), tuple(map(_spell, tree.values()))
    if type(tree) in (tuple, list):
        return type(tree).__name__, tuple(map(_spell, tree))
    if tree is None or isinstance(tree, int):
        return tree
    raise BridgeError(
        f"a {type(tree).__name__} cannot come out of a compiled graph. Return tuples, lists and dicts from the JAX "
        "function."
    )


def _build(spelled: Any, outputs: tuple[Tensor, ...]) -> Any:
    """The tree, with tensors for its numbers."""
    if spelled is None or isinstance(spelled, int):
        return None if spelled is None else outputs[spelled]
    if spelled[0] == "dict":
        return {key: _build(value, outputs) for key, value in zip(spelled[1], spelled[2], strict=True)}
    values = [_build(value, outputs) for value in spelled[1]]
    return tuple(values) if spelled[0] == "tuple" else values


def _plain(tree: Any) -> Any:
    """FX hands over lists and dicts of its own types, which are no pytrees to JAX."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list) or type(tree) is tuple:
        return (tuple if isinstance(tree, tuple) else list)(map(_plain, tree))
    return tree
