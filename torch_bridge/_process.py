"""What torch and JAX share with their process and get in each other's way with: forks, and the memory of a GPU."""

from __future__ import annotations

import functools
import os
import warnings

from torch_bridge._errors import BridgeError

_MEMORY_SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)


class _Jax:
    """Whether JAX runs here, or ran in the process that this one was forked from."""

    runs = False
    is_lost = False


def note_use() -> None:
    """To be called before JAX runs anything.

    Raises:
      BridgeError: in a process forked from one where JAX ran: its threads are not here, and it would hang.
    """
    if _Jax.is_lost:
        raise BridgeError(
            "JAX ran before this process was forked, and its threads did not come along: this call would hang. Start "
            "the process anew: DataLoader(multiprocessing_context='forkserver') or 'spawn', "
            "multiprocessing.get_context('spawn'); or call JAX in the parent only."
        )
    _Jax.runs = True


def _after_fork() -> None:
    _Jax.is_lost = _Jax.runs


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def warn_of_preallocation() -> None:
    """Warns, once, if JAX takes most of a GPU's memory away from torch."""
    if not any(name in os.environ for name in _MEMORY_SETTINGS):
        warnings.warn(
            "JAX reserves three quarters of a GPU's memory when it starts there, and torch gets the rest. Set "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false, or XLA_CLIENT_MEM_FRACTION=.25, in the environment before Python "
            "starts (XLA_PYTHON_CLIENT_PREALLOCATE=true keeps things as they are, without this warning).",
            stacklevel=2,
        )
