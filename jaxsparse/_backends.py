"""Which back end runs where, and why not the others: asked when a product is lowered, as its platform is known then."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax.typing import DTypeLike

import cpu_kernels
from jaxsparse import _measured, _xla
from jaxsparse._measured import Workload
from jaxsparse._sizes import is_unstructured
from pallas_kernels import interpret, mosaic, triton

BACKENDS: dict[str, ModuleType] = {
    "xla": _xla,
    "cpu": cpu_kernels,
    "mosaic": mosaic,
    "triton": triton,
    "interpret": interpret,
}
OPS = _xla.OPS
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_TAKE_16_BIT = ("cpu", "triton", "interpret")  # those that take 16-bit indices of single entries as they are


def check_name(backend: str | None) -> None:
    """Raises ValueError for a back end that does not exist."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {backend!r}: there is {known}, or None for the best that can run here.")


def why_not(
    backend: str, op: str = "spmm", dtype: DTypeLike = "float32", block=(1, 1), platform: str | None = None
) -> str | None:
    """The reason why a back end can't run a product here (or on another platform), or None where it can.

    Args:
      backend: "xla", "cpu", "mosaic", "triton" or "interpret".
      op: the product, as "spmm", "sddmm" or "block_diag_matmul"; the error for an unknown one lists them all.
      dtype: of the arrays.
      block: (i, o) of the matrix, (1, 1) for single entries.
      platform: "cpu", "cuda" (or "gpu"), "rocm" or "tpu"; None means that of this process.
    Raises:
      ValueError: for a back end, a product or a platform that does not exist.
    """
    check_name(backend)
    for value, known, what in ((op, OPS, "op"), (platform, (None, "gpu", *PLATFORMS), "platform")):
        if value not in known:
            there = ", ".join(repr(name) for name in known if name)
            raise ValueError(f"unknown {what} {value!r}: there is {there}.")
    where = _one_word(platform or jax.default_backend())
    return _reason(backend, op, jax.numpy.dtype(dtype), tuple(block), where)


def kernel(work: Workload, backend: str | None, platform: str) -> Callable[..., Any]:
    """The function of plain arrays that computes a product on the platform that a program is lowered for.

    Raises:
      NotImplementedError: if a back end is named and has no such kernel, with the reason.
    """
    backend = choose(work, backend, platform)
    function = getattr(BACKENDS[backend], work.op)
    if is_unstructured(work.block) and backend in _TAKE_16_BIT:
        return function
    return lambda *operands, **options: function(*jax.tree.map(_widened, operands), **options)


def choose(work: Workload, backend: str | None, platform: str) -> str:
    """The back end of a product: the named one, which then runs or raises, or the best."""
    if backend is None:
        best = _best(work, platform)
        return "xla" if best != "xla" and _why_not_lowered(best, work, platform) else best
    if reason := _why_not_lowered(backend, work, platform):
        where = "here" if platform == _one_word(jax.default_backend()) else f"on {platform}"
        raise NotImplementedError(f"backend {backend!r} can't run {work.op} {where}: {reason}")
    return backend


def _best(work: Workload, platform: str) -> str:
    """The back end known to be the fastest, whether or not it can run."""
    if platform == "cpu":
        return "xla" if _is_dense_work(work) else "cpu"
    device = jax.sharding.get_abstract_mesh().abstract_device  # that a program is lowered for, where it is known
    result = _measured.nearest(device.device_kind, work) if device else None
    return result.backend if result else "xla"


def _is_dense_work(work: Workload) -> bool:
    """Diagonal blocks as large as dense layers: XLA's own product is as fast or faster (docs/performance.md)."""
    return work.op.startswith("block_diag") and min(work.block) >= 1024


def _why_not_lowered(backend: str, work: Workload, platform: str) -> str | None:
    """A program for another platform than this process runs on is for another machine: what this one lacks is no
    reason there."""
    elsewhere = platform != _one_word(jax.default_backend())
    return _reason(backend, work.op, jax.numpy.dtype(work.dtype), work.block, platform, elsewhere)


def _reason(backend: str, op: str, *how) -> str | None:
    """Not every back end has a kernel for every product; else it says itself."""
    module = BACKENDS[backend]
    if hasattr(module, op):
        return module.why_not(op, *how)
    return f"it has no kernel for {op}; backend=None takes one that has"


def _one_word(platform: str) -> str:
    """JAX calls a GPU "gpu" where it names the default platform, and by its maker where it lowers a program."""
    if platform != "gpu":
        return platform
    return "rocm" if _is_rocm() else "cuda"


def _is_rocm() -> bool:
    return jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower()


def _widened(a: jax.Array) -> jax.Array:
    return a.astype(jax.numpy.int32) if a.dtype == jax.numpy.uint16 else a
