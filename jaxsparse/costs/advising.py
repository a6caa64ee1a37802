"""What a person would say to the numbers of an explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxsparse.costs import model
from jaxsparse.costs.words import amount, milliseconds, plain

if TYPE_CHECKING:
    from jaxsparse.costs.explaining import Row

_AS_GOOD = 1.15  # times as fast, and no reason to take the other one
_FREEDOM = ("block_diag", "block_sparse", "sparse")  # of where weights may be, growing
_WHAT = {"forward": "The forward pass", "step": "A training step"}


def advice(rows: Sequence[Row], crossover: Mapping[int, float], mode: str) -> str:
    """A sentence or two.

    Args:
      rows: dense first.
      mode: "forward" or "step".
    """
    dense, *others = rows
    if not any(row.layer.weights for row in others if row.layer.kind == "sparse"):
        return "A density of 0 keeps nothing: the output is zero, and no layer is needed."
    others = [row for row in others if row.is_possible and row.layer.weights < dense.layer.weights]
    if not others:
        return "Stay dense: no other format would leave anything out."
    best = _best(others, dense, mode)
    return f"{_verdict(best, dense, mode)} {_beside(best, others, dense, crossover, mode)}".strip()


def _best(others: Sequence[Row], dense: Row, mode: str) -> Row:
    """The fastest, or one that is nearly as fast and freer in where its weights are."""
    most = max(speed(row, dense, mode) for row in others)
    near = [row for row in others if speed(row, dense, mode) >= most / _AS_GOOD]
    return max(near, key=lambda row: _FREEDOM.index(row.layer.kind))


def speed(row: Row, dense: Row, mode: str) -> float:
    """How many times as fast as dense, as measured where it was, else as predicted."""
    if mode in row.races:
        a, b = row.races[mode].milliseconds
        return a / b
    return getattr(dense, mode) / getattr(row, mode)


def leans(row: Row, dense: Row, mode: str) -> bool | None:
    """Whether a format is faster than dense; None where neither a race nor a prediction can tell."""
    if mode in row.races:
        return row.races[mode].faster
    ratio, margin = speed(row, dense, mode), model.margin()
    return None if 1 / margin < ratio < margin else ratio > 1


def _verdict(best: Row, dense: Row, mode: str) -> str:
    faster, ratio, how = leans(best, dense, mode), speed(best, dense, mode), _how(best, mode)
    saved = (
        f"{amount(best.layer.weight_bytes + best.layer.index_bytes, 'B')} of weights and pattern instead of "
        f"{amount(dense.layer.weight_bytes, 'B')}"
    )
    if faster:
        mine, theirs = _times(best, dense, mode)
        times = f"{milliseconds(mine)} instead of {milliseconds(theirs)}"
        fast = f"{plain(ratio, 2)} times as fast"
        return f"Take {best.layer}. {_WHAT[mode]} is {how} {fast} as dense, {times}, with {saved}."
    if faster is None:
        way = "" if mode in best.races else ": measure it (measured=True, or --measure)"
        times = "" if f"{ratio:.2g}" == "1" else f"{ratio:.2g} times "
        return f"Too close to call: {best.layer}, the best format, is {how} {times}as fast as dense{way}."
    return (
        f"Stay dense, if it is for speed: {best.layer}, the best format, is {how} {plain(1 / ratio, 2)} times as slow. "
        f"It would store {saved}."
    )


def _beside(best: Row, others: Sequence[Row], dense: Row, crossover: Mapping[int, float], mode: str) -> str:
    """What else: zeros that can't be arranged in blocks, or where it begins to pay."""
    if not leans(best, dense, mode):
        pays = max(crossover, key=lambda side: crossover[side])
        if crossover[pays] > best.layer.density:  # by a prediction, and the verdict is by a race
            return ""
        if crossover[pays] < 1e-4:
            return "No density would pay at this size: even nearly empty layers take longer than dense ones."
        what = _blocks(pays)
        return f"{what[0].upper()}{what[1:]} pay below a density of about {crossover[pays]:.2g}."
    loose = next((row for row in others if row.layer.kind == "sparse"), None)
    if loose is None or loose is best:
        return ""
    ratio, faster = speed(loose, dense, mode), leans(loose, dense, mode)
    say = {True: f"{plain(ratio, 2)} times as fast", False: "slower than dense", None: "about as fast as dense"}[faster]
    return f"If the zeros can't be arranged in blocks, unstructured is {_how(loose, mode)} {say}."


def _times(row: Row, dense: Row, mode: str) -> tuple[float, float]:
    """Milliseconds of the row and of dense."""
    if mode in row.races:
        theirs, mine = row.races[mode].milliseconds
        return mine, theirs
    return getattr(row, mode), getattr(dense, mode)


def _how(row: Row, mode: str) -> str:
    return "measured to be" if mode in row.races else "predicted to be"


def _blocks(side: int) -> str:
    return "single entries" if side == 1 else f"blocks of {side}"
