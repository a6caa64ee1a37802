"""What this machine does in a second: measured once, in less than ten seconds, and kept in the user's cache.

JAXSPARSE_CACHE names another folder than ~/.cache/jaxsparse. A profile is kept for a machine, the versions of what
multiplies, and the environment variables that choose instruction sets.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxsparse.costs import layers
from jaxsparse.costs.racing import take_turns

FRAMEWORKS = {"jax": "jaxsparse.costs._in_jax", "torch": "torch_bridge.costs"}  # what is timed there, by name
_PACKAGES = {"jax": ("jax", "jaxlib"), "torch": ("torch",)}
_FORMAT = 1  # of the files, and of what is measured
CHOOSE_ISA = (
    "JAXSPARSE_CPU_ISA",
    "XLA_FLAGS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)
_SECONDS = 0.35  # for each of the things that are measured
_DEADLINE = 8.0  # seconds, after which nothing more is begun: on a busy machine the rest is estimated
_LARGE = (1024, 256)  # features and rows of the product that shows the rate of a dtype
_THIN = {2**20: 512, 2**26: 4096}  # bytes of float32 weights, and features, of products with one row
_CALLS = ("forward", "gradients", "step")
# What is not measured in time, relative to what is: to a forward call, and to float32's rate (bytes, to the operations
# of a product). About the geometric means over JAX and torch in benchmarks/results/costs.json and costs_avx2.json.
_USUAL_CALLS = {"gradients": 3.2, "step": 6.2}
_USUAL_RATES = {
    "bfloat16": 0.9,
    "float16": 0.5,
    "float64": 0.5,
    "blocks": 0.6,
    "entries": 0.33,
    2**20: 0.35,
    2**26: 0.14,
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Rates of dense products of one framework on one machine.

    Attributes:
      framework: "jax" or "torch".
      machine: the processor's name.
      threads: that the rates were measured with.
      rates: operations a second of a large dense product, by dtype.
      kernels: operations a second of a sparse one in float32, of "blocks" and of "entries": how much of a core our
        kernels use depends on its instruction set.
      memory: bytes a second that a product with one row reads of its weights, by the bytes of these: of weights that
        fit caches, and of those that don't.
      calls: seconds of the smallest layer, by mode: "forward"; "gradients", forward and backward; "step", with Adam.
      busy: cores that other processes used meanwhile, where the system tells (Linux); such rates are too low.
      estimated: what there was no time to measure, by the names of `rates`, `kernels` and `calls` and the bytes of
        `memory`: it has its usual ratio to what was measured.
    """

    framework: str
    machine: str
    threads: int
    rates: Mapping[str, float]
    kernels: Mapping[str, float]
    memory: Mapping[int, float]
    calls: Mapping[str, float]
    busy: float = 0.0
    estimated: Sequence[str] = ()

    def rate(self, dtype: str) -> float:
        """Operations a second."""
        return self.rates[dtype]

    def memory_rate(self, size: float) -> float:
        """Bytes a second, of a matrix of `size` bytes: between the two that were measured by the size's logarithm."""
        (small, fast), (large, slow) = sorted(self.memory.items())
        part = math.log(max(size, 1) / small) / math.log(large / small)
        return fast * (slow / fast) ** min(max(part, 0.0), 1.0)

    def with_threads(self, threads: int) -> Profile:
        """The same machine with another number of threads: arithmetic goes with it, memory with its square root."""
        more = threads / self.threads
        rates, kernels = ({name: rate * more for name, rate in each.items()} for each in (self.rates, self.kernels))
        memory = {size: rate * math.sqrt(more) for size, rate in self.memory.items()}
        return dataclasses.replace(self, threads=threads, rates=rates, kernels=kernels, memory=memory)


def profile(torch: bool = False) -> Profile:
    """The profile of this machine: from memory, from the cache, or measured now.

    Raises:
      ImportError: where the framework is not installed.
    """
    return _known("torch" if torch else "jax", tuple(os.environ.get(name, "") for name in CHOOSE_ISA))


def is_known(torch: bool = False) -> bool:
    """Whether the profile of this machine need not be measured first."""
    return read(cache_file("torch" if torch else "jax")) is not None


def cache_file(framework: str) -> Path:
    """Where the profile lies, or would."""
    folder = os.environ.get("JAXSPARSE_CACHE")
    folder = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsparse"
    return folder / f"machine-{framework}-{_key(framework)}.json"


@functools.cache
def _known(framework: str, _environment: tuple[str, ...]) -> Profile:
    path = cache_file(framework)
    found = read(path)
    if found is None:
        found = measure(framework)
        write(path, found)
    return found


def read(path: Path) -> Profile | None:
    """The profile in a file; None where there is none, or something that is none."""
    try:
        fields = json.loads(path.read_text())
        fields["memory"] = {int(size): rate for size, rate in fields["memory"].items()}
        fields["estimated"] = tuple(fields.get("estimated", ()))
        found = Profile(**fields)
        numbers = [found.threads, *found.calls.values(), *found.memory.values(), *found.rates.values()]
        numbers += [found.kernels["blocks"], found.kernels["entries"]]
        whole = set(found.rates) == set(layers.ITEMSIZE) and set(found.calls) == {"forward", "gradients", "step"}
        return found if whole and len(found.memory) == 2 and all(n > 0 for n in numbers) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(path: Path, found: Profile) -> None:
    """Writes a profile so that a reader finds the old file or the new one; where that can't be, does without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(dataclasses.asdict(found), file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a home that can't be written to, or a full disk: this process has the numbers
        pass


def measure(framework: str, clock: Callable[[], float] = time.perf_counter, seconds: float = _DEADLINE) -> Profile:
    """Measures a profile, the most telling numbers first.

    Args:
      clock: seconds now.
      seconds: after which no measurement begins, nor another turn of one; what is missing then is estimated.
    Raises:
      ImportError: where the framework is not installed.
    """
    side = importlib.import_module(FRAMEWORKS[framework])
    until, before = clock() + seconds, _used()
    found: dict[str | int, float] = {}
    for name, layer, mode, work in _parts():
        if len(found) < 2 or clock() < until:  # the first two are what the others are estimated by
            taken = _seconds(side, layer, mode, clock, until)
            found[name] = work / taken if work else taken
    usual = {name: found["forward"] * ratio for name, ratio in _USUAL_CALLS.items()}
    usual |= {name: found["float32"] * ratio for name, ratio in _USUAL_RATES.items()}
    whole = usual | found
    wall, all_of_them, own = (b - a for a, b in zip(before, _used(), strict=True))
    return Profile(
        framework,
        cpu_name(),
        side.threads(),
        rates={name: whole[name] for name in layers.ITEMSIZE},
        kernels={name: whole[name] for name in ("blocks", "entries")},
        memory={size: whole[size] for size in _THIN},
        calls={mode: whole[mode] for mode in _CALLS},
        busy=round(max(0.0, all_of_them - own) / wall, 2),
        estimated=tuple(str(name) for name in usual if name not in found),
    )


def _parts() -> Iterator[tuple[str | int, layers.Layer, str, float]]:
    """What is measured: (name, layer, mode, its operations or bytes; 0 where the seconds are what is asked for)."""
    least, (n, rows) = layers.dense((8, 8), 8), _LARGE
    large = {dtype: layers.dense((n, n), rows, dtype) for dtype in layers.ITEMSIZE}
    large["blocks"], large["entries"] = layers.block_sparse((n, n), rows, 0.8, 32), layers.sparse((n, n), rows, 0.4)
    yield "forward", least, "forward", 0
    for name in ("float32", "entries", "blocks"):
        layer = large.pop(name)
        yield name, layer, "forward", layer.operations
    for mode in ("gradients", "step"):
        yield mode, least, mode, 0
    for size, n in _THIN.items():
        yield size, layers.dense((n, n), 1), "forward", size
    for name, layer in large.items():
        yield name, layer, "forward", layer.operations


def _used() -> tuple[float, float, float]:
    """Seconds: now; of all cores, in all processes; of this process. Of all 0 where the system does not tell."""
    try:
        user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
        all_of_them = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        all_of_them = 0.0
    return time.perf_counter(), all_of_them, time.process_time() if all_of_them else 0.0


def _seconds(side: Any, layer: layers.Layer, mode: str, clock: Callable[[], float], until: float) -> float:
    """Seconds of a call, as they are when nothing else disturbs it."""
    with side.wide(layer.dtype):
        turns = take_turns(side.steps(layer, (mode,)), _SECONDS, clock, until=until)
    return min(seconds for (turn,) in turns for seconds in turn)


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _key(framework: str) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [_version(package) for package in _PACKAGES[framework]]
    chosen = [os.environ.get(name, "") for name in CHOOSE_ISA]
    text = json.dumps([_FORMAT, platform.node(), cpu_name(), cores, sys.version_info[:2], versions, chosen])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
