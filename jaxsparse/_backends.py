"""Which back end runs here, and why not the others. Every call of a kernel goes through `call`."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from types import ModuleType
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

import cpu_kernels
from jaxsparse import _xla
from jaxsparse._platforms import by_platform
from pallas_kernels import interpret, mosaic, triton

BACKENDS: dict[str, ModuleType] = {
    "xla": _xla,
    "cpu": cpu_kernels,
    "mosaic": mosaic,
    "triton": triton,
    "interpret": interpret,
}
# Platform: the back ends known to be faster there than XLA, the best first. A GPU's wait for benchmarks/gpu.py to
# have run on one.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ()}

_NARROW = ("triton", "interpret")  # those whose kernels read 16-bit indices of single entries as they are


def check_name(backend: str | None) -> None:
    """Raises ValueError for a back end that does not exist."""
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {backend!r}: there is {known}, or None for the best that can run here.")


def why_not(
    backend: str, op: str = "spmm", dtype: DTypeLike = "float32", block=(1, 1), platform: str | None = None
) -> str | None:
    """The reason why a back end can't run an op here (or on another platform), or None where it can."""
    check_name(backend)
    return BACKENDS[backend].why_not(op, jax.numpy.dtype(dtype), block, platform or jax.default_backend())


def call(op: str, backend: str | None, block: tuple[int, int], /, *operands, **options):
    """Runs one product on plain arrays: on the named back end, or on the best one of each platform.

    Args:
      op: the name of a function that back ends share.
      backend: a name, which then runs or raises; None lets each platform choose when the program is lowered.
      block: (i, o) of the matrix, for `why_not`.
      operands: what is traced, None for an optional array.
      options: what is static.
    Raises:
      NotImplementedError: if the named back end can't run, with the reason.
    """
    dtype = operands[0].dtype
    if backend is not None:
        reason = why_not(backend, op, dtype, block)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} can't run {op} here: {reason}")
    if block != (1, 1) or backend not in _NARROW:
        operands = jax.tree.map(_widened, operands)
    return by_platform(_Product(op, backend, dtype, block, tuple(options.items())), *operands)


def _widened(a: jax.Array) -> jax.Array:
    return a.astype(jax.numpy.int32) if a.dtype == jax.numpy.uint16 else a


class _Product(NamedTuple):
    """Which function a platform gets."""

    op: str
    backend: str | None
    dtype: jax.numpy.dtype
    block: tuple[int, int]
    options: tuple[tuple[str, Hashable], ...]

    def __call__(self, platform: str):
        backend = self.backend or self._best(platform)
        return functools.partial(getattr(BACKENDS[backend], self.op), **dict(self.options))

    def _best(self, platform: str) -> str:
        runs = (b for b in _PREFERRED.get(platform, ()) if not why_not(b, self.op, self.dtype, self.block, platform))
        return "xla" if self._is_dense_work(platform) else next(runs, "xla")

    def _is_dense_work(self, platform: str) -> bool:
        """Diagonal blocks as large as dense layers: XLA's own product is as fast or faster (docs/performance.md).
        On a GPU that is expected of all, as one strided-batched product reads them where they are."""
        return self.op.startswith("block_diag") and (platform == "cuda" or min(self.block) >= 1024)

    def keeping(self, used: tuple[bool, ...]):
        return self._replace(options=(*self.options, ("wanted", used)))  # `spmm_grads` alone has several results

    def flops(self, operands, results) -> int:
        """Two for every row of x and every stored number, in each result."""
        weight = {"spmm": 1, "block_diag_matmul": 1, "spmm_grads": 2}.get(self.op)
        stored = results[0] if weight is None else operands[weight]
        return 2 * operands[0][0] * math.prod(stored) * len(results)
