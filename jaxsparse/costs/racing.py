"""Two functions raced against each other on a machine that others use too: who is faster, or that nobody can tell.

Shared by `jaxsparse.measure` and by `only_if_faster` of both patchers.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Function = Callable[[], Any]
Turn = list[list[float]]  # seconds of each call of each function

_TURNS = (7, 41)  # of each function: at least, at most
_TURN = 0.003  # seconds of a turn, in which short calls are repeated
_CLEAR = 1.3  # times as fast in every turn, and the race is decided
_CHANCE = 0.025  # of a verdict about two equals, in each of two tests
_DISTURBED = 1.25  # times as long as its quick turns


@dataclasses.dataclass(frozen=True)
class Race:
    """What a race of a dense and a sparse layer showed.

    Attributes:
      milliseconds: of a call, (dense, sparse): the median of the turns that nothing disturbed.
      won: turns in which the sparse one was faster.
      turns: those that were not even: of all turns, or of those that disturbed neither, whichever tells more.
    """

    milliseconds: tuple[float, float]
    won: int
    turns: int

    @property
    def faster(self) -> bool | None:
        """Whether the sparse one is faster, by a two-sided sign test over the turns; None where that can't tell."""
        if self.chance > _CHANCE:
            return None
        return 2 * self.won > self.turns

    @property
    def chance(self) -> float:
        """How often two equals part as clearly as these did."""
        least = min(self.won, self.turns - self.won)
        tail = sum(math.comb(self.turns, k) for k in range(least + 1)) / 2**self.turns
        return min(1.0, 2 * tail)

    def __str__(self) -> str:
        dense, sparse = self.milliseconds
        if self.faster is None:
            return f"can't tell: {sparse:.3g} ms against {dense:.3g}, faster in {self.won} of {self.turns} turns"
        what, times = ("faster", dense / sparse) if self.faster else ("slower", sparse / dense)
        return f"{times:.2g} times {what}: {sparse:.3g} ms against {dense:.3g}"


class Races:
    """Races of dense layers and their replacements; equal pairs are raced once.

    Attributes:
      batch: the number of input rows to measure with.
    """

    def __init__(self, batch: int | None):
        if batch is None:
            raise ValueError("only_if_faster measures layers: give batch, the number of input rows to measure with.")
        self.batch = batch
        self.done: dict[Any, Race] = {}

    def __call__(self, key: Any, make_steps: Callable[[], Sequence[Function]]) -> Race:
        """The race of the two steps, dense and sparse, that are made for a key that is new."""
        if key not in self.done:
            self.done[key] = race(make_steps())
        return self.done[key]


def race(functions: Sequence[Function], seconds: float = 1.5, clock: Callable[[], float] = time.perf_counter) -> Race:
    """Races (dense, sparse).

    Other processes only ever add time, and to both alike. So a turn counts as the slowest of the quickest quarter of
    its calls, and the turns that took neither much longer than its quick ones are judged by themselves, too.

    Args:
      seconds: after which no new turn begins, unless the least number of turns needs more; a clear race ends earlier.
      clock: seconds now.
    """
    taken = take_turns(functions, seconds, clock, _is_clear)
    times = [[_typical(turn[k]) for turn in taken] for k in (0, 1)]
    limits = [_DISTURBED * sorted(each)[len(each) // 5] for each in times]
    turns = list(zip(*times, strict=True))
    quick = [pair for pair in turns if all(t <= top for t, top in zip(pair, limits, strict=True))]
    dense, sparse = (
        1e3 * statistics.median(t for t in each if t <= top) for each, top in zip(times, limits, strict=True)
    )
    found = [
        Race((dense, sparse), sum(b < a for a, b in pairs), sum(a != b for a, b in pairs)) for pairs in (turns, quick)
    ]
    return min(found, key=lambda race: race.chance)


def take_turns(
    functions: Sequence[Function],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    is_decided: Callable[[Sequence[Turn]], bool] = lambda turns: False,
    pause: float = 0.0,
    until: float = math.inf,
) -> list[Turn]:
    """Calls functions by turns, every other time in reverse, so that all see the same machine.

    Not counted are the first two calls, which compile or build indices, and the first of every turn of several, which
    wakes threads. Before a turn nothing happens for `pause` seconds: the idle threads of another framework may spin.
    After `until` on the clock no second turn begins, however few there were.
    """
    start = clock()
    repeats = [_repeats(min(_timed(function, clock, calls=2))) for function in functions]
    turns: list[Turn] = []
    while len(turns) < _TURNS[1]:
        order = list(enumerate(zip(functions, repeats, strict=True)))
        turn = {k: _rested(f, clock, calls, pause) for k, (f, calls) in (order[::-1] if len(turns) % 2 else order)}
        turns.append([turn[k] for k in range(len(functions))])
        if len(turns) >= _TURNS[0] and (clock() - start > seconds or is_decided(turns)):
            break
        if clock() >= until:
            break
    return turns


def _typical(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def _repeats(seconds: float) -> int:
    """Calls of a turn: one, or one that wakes and those that fill it."""
    return 1 if seconds > _TURN else 1 + min(20, round(_TURN / max(seconds, 1e-6)))


def _rested(function: Function, clock: Callable[[], float], calls: int, pause: float) -> list[float]:
    time.sleep(pause)
    return _timed(function, clock, calls)


def _timed(function: Function, clock: Callable[[], float], calls: int) -> list[float]:
    """Seconds of each call; of several, the first is left out."""
    times = []
    for _ in range(calls):
        start = clock()
        function()
        times.append(clock() - start)
    return times[1:] or times


def _is_clear(turns: Sequence[Turn]) -> bool:
    """Whether the same function was by far the fastest in every turn."""
    least = [[min(calls) for calls in turn] for turn in turns]
    winners = {times.index(min(times)) for times in least}
    return len(winners) == 1 and all(_CLEAR * a < b for a, b, *_ in map(sorted, least))
