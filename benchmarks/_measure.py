"""Takes turns: every contender of a cell once a round, in a new order each round, and the machine's own limits."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from jaxsparse.costs.machine import CHOOSE_ISA

ROUNDS = (7, 15)  # at least, at most
PAUSE = 0.003  # between turns: idle threads of torch (OpenMP) and of XLA spin for less than that, then sleep
TURN = 0.03  # a turn repeats short calls for about this long, as training does
HOPELESS = 10.0  # a first call longer than this is the only one
LONG = 0.02  # from this length on, a call is worth no untimed one before it


@dataclasses.dataclass
class Result:
    """The milliseconds of one contender, a number a round; or why it has none, or only one."""

    rounds: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def ms(self) -> float | None:
        return float(np.median(self.rounds)) if self.rounds else None

    @property
    def alternated(self) -> bool:
        return len(self.rounds) > 1


def measure(
    builders: dict[str, Callable], first_rows: np.ndarray, seconds: float, longest: float, keep: tuple[str, ...]
) -> dict[str, Result]:
    """Times one call of each.

    Args:
      builders: by name, what makes a call; an exception becomes the contender's note.
      first_rows: what a call must return, to as many rows; a wrong result is not timed.
      seconds: for all rounds together, unless the least number of rounds needs more.
      longest: contenders whose call takes more seconds than this sit out the rounds, but for those
      keep: named here and those within 1.5x of the fastest peer.
    """
    results = {name: Result() for name in builders}
    calls, estimates = {}, {}
    for name, build in builders.items():
        try:
            call = build()
            start = time.perf_counter()
            _check(np.asarray(call()[: len(first_rows)]), first_rows)
            estimates[name] = time.perf_counter() - start
            if estimates[name] < HOPELESS:  # a first call may compile or build indices, so a second one tells
                estimates[name] = _timed(call)
        except Exception as error:
            results[name].note = shortened(error)
            continue
        calls[name] = call
    near = 1.5 * min((t for name, t in estimates.items() if not name.startswith("ours")), default=0)
    for name, estimate in estimates.items():
        if estimate > max(longest, near) and name not in keep:
            results[name] = _once(estimate)
            del calls[name]
    _alternate(calls, estimates, results, seconds)
    return results


def _alternate(calls, estimates, results, seconds: float) -> None:
    repeats = {name: max(1, min(50, round(TURN / max(estimates[name], 1e-6)))) for name in calls}
    waking = {name for name in calls if estimates[name] < LONG}
    a_round = sum(PAUSE + estimates[name] * (repeats[name] + (name in waking)) for name in calls)
    count = int(np.clip(seconds / max(a_round, 1e-6), *ROUNDS))
    rng, names = np.random.default_rng(0), list(calls)
    for _ in range(count):
        for name in rng.permutation(names):
            time.sleep(PAUSE)
            if name in waking:
                calls[name]()  # wakes the threads and brings its own arrays back into the caches
            times = [_timed(calls[name]) for _ in range(repeats[name])]
            results[name].rounds.append(1e3 * float(np.median(times)))


def compile_times(compilers: dict[str, Callable], clear: Callable, rounds: int) -> dict[str, Result]:
    """Times tracing, lowering and compiling from nothing; the first round, which loads libraries, is left out."""
    results = {name: Result() for name in compilers}
    for turn in range(rounds + 1):
        for name, compiler in compilers.items():
            clear()
            try:
                took = _timed(compiler)
            except Exception as error:
                results[name].note = shortened(error)
                continue
            if turn:
                results[name].rounds.append(1e3 * took)
    return results


def ratio(slower: Result, faster: Result) -> float:
    """The median over rounds of slower / faster, each pair taken within one round."""
    return float(np.median(np.divide(slower.rounds, faster.rounds)))


def shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 110 else text[:107] + '...'}"


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _once(seconds: float) -> Result:
    return Result([1e3 * seconds], "one call, too slow to take turns")


def _check(got: np.ndarray, want: np.ndarray) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    if not error < 1e-4:
        raise ArithmeticError(f"wrong result, relative error {error:.1e}")


def machine_limits(jax_product: Callable, torch_product: Callable, flops: int, torch_sum: Callable, size: int) -> dict:
    """What this machine reaches in the same run: dense products, and one pass over memory."""
    sources = {"jax": jax_product, "torch": torch_product, "memory": torch_sum}
    best = dict.fromkeys(sources, np.inf)
    for _ in range(10):
        for name, call in sources.items():
            time.sleep(PAUSE)
            call()
            best[name] = min(best[name], _timed(call))
    return {
        "jax_dense_gflops": flops / best["jax"] / 1e9,
        "torch_dense_gflops": flops / best["torch"] / 1e9,
        "memory_read_gb_per_s": size / best["memory"] / 1e9,
    }


def cache_rates() -> dict:
    """What one core multiplies, and loads from its caches; nothing where there is no compiler."""
    source = Path(__file__).with_name("load_rates.cc")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "load_rates")
        build = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-ffp-contract=fast", "-o", program, source]
        try:
            subprocess.run(build, check=True, capture_output=True)
            return json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return {}


def machine(packages: Sequence[str]) -> dict:
    """What a run ran on, and with; of the named packages, the versions."""
    import torch

    import cpu_kernels

    try:
        kernels = cpu_kernels.isa()
    except NotImplementedError as reason:
        kernels = f"none: {reason}"
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": kernels,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "environment": {name: os.environ[name] for name in CHOOSE_ISA if name in os.environ},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg(),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class Load:
    """How many cores other processes kept busy meanwhile, where the system tells (Linux)."""

    of_others: float | None = None

    def __enter__(self):
        self._before = self._now()
        return self

    def __exit__(self, *_):
        after = self._now()
        if self._before and after:
            wall, busy, own = (b - a for a, b in zip(self._before, after, strict=True))
            self.of_others = round(max(0.0, busy - own) / wall, 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()
