"""Which back end runs here, and why not the others. Every call of a kernel goes through `call`."""

from __future__ import annotations

from types import ModuleType

from jaxsparse import _xla

BACKENDS: dict[str, ModuleType] = {"xla": _xla}


def check_name(backend: str | None) -> None:
    """Raises ValueError for a back end that does not exist."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {backend!r}: there is {known}, or None for the best that can run here.")


def call(op: str, backend: str | None, *args, **kwargs):
    """Runs one product on plain arrays: on the named back end, or on the best one of each platform."""
    return getattr(BACKENDS[backend or "xla"], op)(*args, **kwargs)
