"""Which back end runs where, and why not the others: asked when a product is lowered, as its platform is known then."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax.typing import DTypeLike

import cpu_kernels
from jaxsparse import _xla
from pallas_kernels import interpret, mosaic, triton

BACKENDS: dict[str, ModuleType] = {
    "xla": _xla,
    "cpu": cpu_kernels,
    "mosaic": mosaic,
    "triton": triton,
    "interpret": interpret,
}
OPS = ("spmm", "sddmm", "spmm_grads", "block_diag_matmul", "block_diag_outer")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Platform: the back ends known to be faster there than XLA, the best first. A GPU's wait for benchmarks/gpu.py to
# have run on one.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ()}

_READ_16_BIT = ("triton", "interpret")  # those whose kernels read 16-bit indices of single entries as they are


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
      op: "spmm", "sddmm", "spmm_grads", "block_diag_matmul" or "block_diag_outer".
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
    return BACKENDS[backend].why_not(op, jax.numpy.dtype(dtype), tuple(block), where)


def kernel(op: str, backend: str | None, dtype, block: tuple[int, int], platform: str) -> Callable[..., Any]:
    """The function of plain arrays that computes a product on the platform that a program is lowered for.

    Raises:
      NotImplementedError: if a back end is named and has no such kernel, with the reason.
    """
    backend = choose(op, backend, dtype, block, platform)
    function = getattr(BACKENDS[backend], op)
    if block == (1, 1) and backend in _READ_16_BIT:
        return function
    return lambda *operands, **options: function(*jax.tree.map(_widened, operands), **options)


def choose(op: str, backend: str | None, dtype, block: tuple[int, int], platform: str) -> str:
    """The back end of a product: the named one, which then runs or raises, or the best."""
    if backend is None:
        return _best(op, dtype, block, platform)
    if reason := _why_not_lowered(backend, op, dtype, block, platform):
        where = "here" if platform == _one_word(jax.default_backend()) else f"on {platform}"
        raise NotImplementedError(f"backend {backend!r} can't run {op} {where}: {reason}")
    return backend


def _best(op: str, dtype, block: tuple[int, int], platform: str) -> str:
    if _is_dense_work(op, block, platform):
        return "xla"
    runs = (b for b in _PREFERRED.get(platform, ()) if not _why_not_lowered(b, op, dtype, block, platform))
    return next(runs, "xla")


def _is_dense_work(op: str, block: tuple[int, int], platform: str) -> bool:
    """Diagonal blocks as large as dense layers: XLA's own product is as fast or faster (docs/performance.md).
    On a GPU that is expected of all, as one strided-batched product reads them where they are."""
    return op.startswith("block_diag") and (platform == "cuda" or min(block) >= 1024)


def _why_not_lowered(backend: str, op: str, dtype, block: tuple[int, int], platform: str) -> str | None:
    """A program for another platform than this process runs on is for another machine: what this one lacks is no
    reason there."""
    elsewhere = platform != _one_word(jax.default_backend())
    return BACKENDS[backend].why_not(op, dtype, block, platform, elsewhere)


def _one_word(platform: str) -> str:
    """JAX calls a GPU "gpu" where it names the default platform, and by its maker where it lowers a program."""
    if platform != "gpu":
        return platform
    return "rocm" if _is_rocm() else "cuda"


def _is_rocm() -> bool:
    return jax.default_backend() == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower()


def _widened(a: jax.Array) -> jax.Array:
    return a.astype(jax.numpy.int32) if a.dtype == jax.numpy.uint16 else a
