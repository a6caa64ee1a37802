"""What this machine does in a second: measured once, in some seconds, and kept in the user's cache.

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
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxsparse.costs import layers
from jaxsparse.costs.racing import take_turns

FRAMEWORKS = {"jax": "jaxsparse.costs._in_jax", "torch": "torch_bridge.costs"}  # what is timed there, by name
_PACKAGES = {"jax": ("jax", "jaxlib"), "torch": ("torch",)}
_FORMAT = 1  # of the files, and of what is measured
_CHOOSE_ISA = (
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
_LARGE = (1024, 256)  # features and rows of the product that shows the rate of a dtype
_KERNELS = {
    "blocks": lambda shape, rows: layers.block_sparse(shape, rows, 0.8, 32),
    "entries": lambda shape, rows: layers.sparse(shape, rows, 0.4),
}
_THIN = {2**20: 512, 2**26: 4096}  # bytes of float32 weights, and features, of products with one row


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
    """

    framework: str
    machine: str
    threads: int
    rates: Mapping[str, float]
    kernels: Mapping[str, float]
    memory: Mapping[int, float]
    calls: Mapping[str, float]

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
    return _known("torch" if torch else "jax", tuple(os.environ.get(name, "") for name in _CHOOSE_ISA))


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


def measure(framework: str, clock: Callable[[], float] = time.perf_counter) -> Profile:
    """Measures a profile.

    Args:
      clock: seconds now.
    Raises:
      ImportError: where the framework is not installed.
    """
    side = importlib.import_module(FRAMEWORKS[framework])
    calls = _seconds(side, layers.dense((8, 8), 8), ("forward", "gradients", "step"), clock)
    rates, kernels, memory = {}, {}, {}
    for dtype in layers.ITEMSIZE:
        large = layers.dense((_LARGE[0], _LARGE[0]), _LARGE[1], dtype)
        rates[dtype] = large.operations / _seconds(side, large, ("forward",), clock)["forward"]
    for name, make in _KERNELS.items():
        large = make((_LARGE[0], _LARGE[0]), _LARGE[1])
        kernels[name] = large.operations / _seconds(side, large, ("forward",), clock)["forward"]
    for size, n in _THIN.items():
        memory[size] = size / _seconds(side, layers.dense((n, n), 1), ("forward",), clock)["forward"]
    return Profile(framework, cpu_name(), side.threads(), rates, kernels, memory, calls)


def _seconds(side: Any, layer: layers.Layer, modes: tuple[str, ...], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each mode, as they are when nothing else disturbs them."""
    with side.wide(layer.dtype):
        found = {}
        for mode, function in zip(modes, side.steps(layer, modes), strict=True):
            found[mode] = min(seconds for (turn,) in take_turns([function], _SECONDS, clock) for seconds in turn)
    return found


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
    chosen = [os.environ.get(name, "") for name in _CHOOSE_ISA]
    text = json.dumps([_FORMAT, platform.node(), cpu_name(), cores, sys.version_info[:2], versions, chosen])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
