"""Which kernels took their process with them: they are not tried on and on, so that the minutes go to the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ENDED = "the process ended in this step"  # what a step that did so has as its result begins with this
RUNNING = "while it ran"  # and not while it was built
MOST = 3  # kinds of checks of a back end that may do so, before no other of it is made
_CHECK = re.compile(r"check (\w+) block \d+ (.+) \w+ batch \d+")  # back end and kind
_FAMILIES = {
    "blocks": ("random", "together", "sharing x"),
    "block-diagonal": ("block-diagonal",),
    "unstructured": ("int32", "uint16"),
}


def why_not_check(name: str, steps: Mapping[str, Any]) -> str | None:
    """Why a check is not made, if others of its back end, and of its kind, ended their process."""
    if not (match := _CHECK.fullmatch(name)):
        return None
    lost = {(backend, kind) for other, backend, kind in _lost_checks(steps) if other != name}
    if match.groups() in lost:
        return f"not made: another of {match[2]} ended its process"
    if sum(backend == match[1] for backend, _ in lost) >= MOST:
        return f"not made: {MOST} kinds of checks of {match[1]} ended their process"
    return None


def left_out(family: str, steps: Mapping[str, Any]) -> set[str]:
    """Back ends that are not timed with matrices of this family: a check of such a matrix, or a timing, ended its
    process."""
    checks = {backend for _, backend, kind in _lost_checks(steps) if kind in _FAMILIES[family]}
    errors = [r["error"] for name, r in steps.items() if name.startswith(f"time {family} ") and _ended(r)]
    return checks | {backend for backend in ("mosaic", "triton") if any(f"ours ({backend}" in e for e in errors)}


def _lost_checks(steps: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, back end and kind."""
    for name, result in steps.items():
        if _ended(result) and (match := _CHECK.fullmatch(name)):
            yield name, match[1], match[2]


def _ended(result: Mapping[str, Any]) -> bool:
    return result.get("error", "").startswith(ENDED)
