"""What runs on this machine, and what is missing: `devices`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

import cpu_kernels
from cpu_kernels import direct
from jaxsparse import _backends, _measured
from jaxsparse._measured import Result

PACKAGES = ("jaxsparse", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DRIVER = Path("/proc/driver/nvidia/version")  # on Linux


class _Kind(NamedTuple):
    """What a back end is, its platform (None: the one of this process), and a workload that it is made for."""

    about: str
    platform: str | None
    dtype: str
    block: tuple[int, int]


_KINDS = {
    "xla": _Kind("plain XLA, on every device", None, "float32", (1, 1)),
    "cpu": _Kind("C++ kernels for CPUs", "cpu", "float32", (1, 1)),
    "mosaic": _Kind("Pallas kernels for Hopper GPUs, blocks alone", "cuda", "bfloat16", (64, 64)),
    "triton": _Kind("Pallas kernels for NVIDIA GPUs since Ampere", "cuda", "bfloat16", (64, 64)),
    "interpret": _Kind("the Triton kernels under an interpreter, for tests", None, "float32", (1, 1)),
}


class Platform(NamedTuple):
    """The devices of one platform of JAX; the default one is where products run unless they are told otherwise."""

    name: str
    kinds: tuple[str, ...]
    number: int
    default: bool


class BackEnd(NamedTuple):
    """A back end, the dtypes that it has kernels for, and whether it runs here; if not, the reason and the remedy."""

    name: str
    about: str
    runs: bool
    dtypes: tuple[str, ...]
    reason: str | None
    remedy: str | None


class Library(NamedTuple):
    """The compiled CPU kernels: the file, how it got there, the instruction set in use; None where there is none."""

    file: str | None
    origin: str | None
    isa: str | None


class Gpu(NamedTuple):
    """A kind of GPU of this machine, and the measured results that `backend=None` goes by on it."""

    kind: str
    results: tuple[Result, ...]


class Torch(NamedTuple):
    """The way that the layers of `torch_bridge` take; `remedy` where there is a faster one."""

    cpu: str
    cuda: str
    remedy: str | None


@dataclasses.dataclass(frozen=True, repr=False)
class Devices:
    """What `devices` found. As text it is a table.

    Attributes:
      versions: package: version, or None where it is not installed; "python" too.
      platforms: what JAX computes on.
      backends: all that there are, in the order of `why_not`.
      library: the compiled CPU kernels.
      gpus: the kinds of GPU here.
      torch: None where torch is not installed.
    """

    versions: dict[str, str | None]
    platforms: tuple[Platform, ...]
    backends: tuple[BackEnd, ...]
    library: Library
    gpus: tuple[Gpu, ...]
    torch: Torch | None

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts and lists, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def __rich__(self) -> Any:
        from jaxsparse import _devices_table

        return _devices_table.draw(self)

    def __repr__(self) -> str:
        from jaxsparse._text import as_text

        return as_text(self)


def devices() -> Devices:
    """What runs on this machine: platforms, back ends, versions, the compiled kernels, the ways of torch's layers.

    Each back end is asked on its own platform about a workload that it is made for; `why_not` answers for others. torch
    is imported if it is installed.

    Returns:
      A text, for `print`; its attributes are `versions`, `platforms`, `backends`, `library`, `gpus` and `torch`, and
      `as_dict()` gives all of them for JSON.
    """
    return Devices(
        versions=_versions(),
        platforms=_platforms(),
        backends=tuple(_backend(name, kind) for name, kind in _KINDS.items()),
        library=_library(),
        gpus=_gpus(),
        torch=_torch() if importlib.util.find_spec("torch") else None,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(v) for name, v in value._asdict().items()}  # pyright: ignore
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _platforms() -> tuple[Platform, ...]:
    found: dict[str, list[Any]] = {}
    for device in [*jax.devices(), *jax.devices("cpu")]:  # a CPU is always among them
        found.setdefault(device.platform, []).append(device)
    default = jax.devices()[0].platform
    return tuple(
        Platform(name, tuple(sorted({d.device_kind for d in here})), len(set(here)), name == default)
        for name, here in found.items()
    )


def _backend(name: str, kind: _Kind) -> BackEnd:
    where = kind.platform or jax.default_backend()
    reason = _backends.why_not(name, dtype=kind.dtype, block=kind.block, platform=where)
    dtypes = tuple(dtype for dtype in _DTYPES if _has_kernels(name, kind, dtype))
    if reason is None:
        return BackEnd(name, kind.about, True, dtypes, None, None)
    return BackEnd(name, kind.about, False, dtypes, *_split(name, reason))


def _has_kernels(name: str, kind: _Kind, dtype: str) -> bool:
    """Whether a back end knows a dtype, wherever it may run: that is what each asks first."""
    reason = _backends.why_not(name, dtype=dtype, block=kind.block, platform=kind.platform)
    return not (reason or "").startswith("dtype ")


def _split(name: str, reason: str) -> tuple[str, str | None]:
    """A reason, and the remedy: in it as a second sentence, or known of its kind."""
    what, _, remedy = reason.partition(". ")
    if name == "cpu":
        return what, remedy or "Reinstall jaxsparse on this machine, with a C++17 compiler."
    if "older than" in what:
        return what.partition(";")[0], "Install Python 3.12 or newer, and JAX 0.11.2 or newer."
    if "no NVIDIA GPU" not in what:
        return what, "Leave the choice to backend=None: plain XLA runs on this device."
    if _DRIVER.exists():
        return f"this JAX ({jax.__version__}) sees no NVIDIA GPU", "pip install 'jaxsparse[cuda13]', or [cuda12]."
    return what, "Use a machine with one; on this one, interpret runs the Triton kernels, slowly."


def _library() -> Library:
    file = cpu_kernels.library_file()
    if file is None:
        return Library(None, None, None)
    return Library(str(file), _origin(file), None if direct.why_not() else direct.isa())


def _origin(file: Path) -> str:
    """How the compiled library got to its place, by what the installer noted (PEP 610)."""
    try:
        installed = metadata.distribution("jaxsparse")
    except metadata.PackageNotFoundError:
        return "beside the sources"
    if not file.is_relative_to(Path(str(installed.locate_file(""))).resolve()):
        return "beside the sources"
    noted = json.loads(installed.read_text("direct_url.json") or "{}")
    if "dir_info" in noted:
        kind = "an editable install of" if noted["dir_info"].get("editable") else "compiled when it was installed from"
        return f"{kind} {noted['url']}"
    return f"from {noted.get('url', 'a package index')}"


def _gpus() -> tuple[Gpu, ...]:
    kinds = {d.device_kind for d in jax.devices() if d.platform != "cpu"}
    return tuple(Gpu(kind, _measured.results(kind)) for kind in sorted(kinds))


def _torch() -> Torch:
    import torch

    reason = direct.why_not(torch)
    cpu = f"through JAX: {reason}" if reason else "straight to the C++ kernels, on torch's threads, without JAX"
    remedy = None
    if reason and not direct.why_not():
        remedy = "Install torch 2.10 or newer."
    if not torch.cuda.is_available():
        return Torch(cpu, "this torch sees no GPU", remedy)
    if any(d.platform == "gpu" for d in jax.devices()):
        return Torch(cpu, "through JAX, on the same GPU and in the same memory", remedy)
    return Torch(cpu, "not possible: this JAX sees no GPU", "pip install 'jaxsparse[cuda13]', or [cuda12].")
