"""Races: the machine's clock is the test's own, so that no timing decides."""

import functools
import random

import pytest

from jaxsparse.costs.racing import Race, Races, race


class Machine:
    """A clock, and functions that take so many milliseconds on it; `others` says what other processes add to a call."""

    def __init__(self, *milliseconds, others=lambda call: 0.0):
        self.now, self.calls = 0.0, []
        self.functions = [functools.partial(self.run, k, ms, others) for k, ms in enumerate(milliseconds)]

    def run(self, k, ms, others):
        self.now += 1e-3 * (ms + others(len(self.calls)))
        self.calls.append(k)

    def race(self, **options):
        return race(self.functions, clock=lambda: self.now, **options)


def test_functions_take_turns_and_change_sides_in_a_race():
    machine = Machine(100.0, 99.0)
    assert machine.race().milliseconds == pytest.approx((100, 99))
    assert machine.calls == [0, 0, 1, 1, *[0, 1, 1, 0] * 3, 0, 1]  # more turns would take more than its seconds


def test_a_clear_race_is_short_and_a_close_one_is_not():
    clear, close = Machine(4.0, 8.0), Machine(4.0, 4.1)
    assert clear.race().faster is False and close.race().faster is False
    assert len(clear.calls) == 4 + 2 * 7 and len(close.calls) == 4 + 2 * 41


def test_short_calls_are_repeated_and_the_one_that_wakes_is_not_counted():
    machine = Machine(0.5, 0.2)
    machine.functions = [functools.partial(waking, machine, k, ms) for k, ms in ((0, 0.5), (1, 0.2))]
    assert machine.race().milliseconds == pytest.approx((0.5, 0.2))


def waking(machine, k, ms):
    """A call after one of the other function takes 5 ms more."""
    machine.now += 1e-3 * (ms if machine.calls[-1:] == [k] else ms + 5)
    machine.calls.append(k)


@pytest.mark.parametrize("ratio", [0.9, 1.1])
@pytest.mark.parametrize("ms", [0.05, 2.0, 20.0])
@pytest.mark.parametrize("busy", ["half of the time", "at odd times"])
def test_other_processes_do_not_turn_a_decision(ratio, ms, busy):
    rng = random.Random(0)
    others = {
        "half of the time": lambda call: 15 * ms * (call // 40 % 2),
        "at odd times": lambda call: rng.expovariate(1 / ms) if rng.random() < 0.6 else 0.0,
    }[busy]
    found = Machine(ms, ratio * ms, others=others).race()
    dense, sparse = found.milliseconds
    assert (sparse < dense) == (ratio < 1)
    assert found.faster in (ratio < 1, None)


def test_a_race_that_is_cut_short_as_clear_has_a_verdict_however_busy_the_machine_is():
    rng = random.Random(0)
    for ms in (0.05, 2.0, 20.0):
        machine = Machine(ms, 0.1 * ms, others=lambda call, ms=ms: 0.3 * ms * rng.random())
        assert machine.race().faster is True


@pytest.mark.parametrize("ms", [0.05, 2.0, 20.0])
def test_equals_on_a_busy_machine_can_not_be_told_apart(ms):
    """Of a hundred races of equals, few end with a verdict."""
    rng = random.Random(0)
    others = lambda call: rng.expovariate(1 / ms) if rng.random() < 0.6 else 0.01 * ms * rng.random()  # noqa: E731
    verdicts = [Machine(ms, ms, others=others).race().faster for _ in range(100)]
    assert sum(verdict is not None for verdict in verdicts) <= 12


def test_a_race_says_what_it_showed():
    assert Race((2.0, 1.0), 20, 20).faster is True and str(Race((2.0, 1.0), 20, 20)) == "2 times faster: 1 ms against 2"
    assert Race((1.0, 2.0), 0, 20).faster is False and "2 times slower" in str(Race((1.0, 2.0), 0, 20))
    assert Race((1.0, 0.9), 12, 20).faster is None and "can't tell" in str(Race((1.0, 0.9), 12, 20))
    assert Race((1.0, 1.0), 0, 0).faster is None and Race((1.0, 1.0), 0, 0).chance == 1
    assert Race((1.0, 0.5), 6, 6).faster is None  # six heads in a row are no proof


def test_equal_pairs_are_raced_once():
    races, made = Races(16), []
    for key in ("a", "b", "a"):
        races(key, lambda key=key: made.append(key) or [int, int])
    assert made == ["a", "b"]
    with pytest.raises(ValueError, match="give batch"):
        Races(None)
