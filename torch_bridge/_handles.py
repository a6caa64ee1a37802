"""The names by which graphs of torch.compile and torch.export call functions."""

from __future__ import annotations

import uuid
import weakref
from typing import Any, Protocol

FUNCTIONS: weakref.WeakValueDictionary[str, InGraph] = weakref.WeakValueDictionary()


class InGraph(Protocol):
    """What `compile.in_graph` can call."""

    def in_graph(self, args: tuple, kwargs: dict) -> Any: ...


def new_handle(function: InGraph, name: str) -> str:
    """A name by which a graph can call `function`, for as long as that lives.

    No two processes share one: torch caches graphs on disk, and would take one function for another.
    """
    handle = f"{name}#{uuid.uuid4().hex}"
    FUNCTIONS[handle] = function
    return handle
