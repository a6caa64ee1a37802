"""Named cases and the one comparison that every op, back end and layer is tested with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import reference
from jaxsparse.formats import BlockPattern


@dataclasses.dataclass
class Case:
    """One sparse matrix and the leading dimensions of its input."""

    name: str
    make: Callable[[], BlockPattern]
    batch: tuple[int, ...] = (24,)

    @functools.cached_property
    def pattern(self) -> BlockPattern:
        return self.make()


def _random(shape, density, block=(1, 1)):
    return lambda: BlockPattern.random(jax.random.key(7), shape, density=density, block=block)


def _holes(shape, block=(1, 1)):
    """Empty rows and columns, full rows and columns, and columns of very different lengths."""

    def make():
        rng = np.random.default_rng(3)
        mask = rng.random(shape) < rng.random(shape[1]) ** 4
        mask[:, shape[1] // 2], mask[shape[0] // 3] = True, True
        rows, cols = slice(shape[0] // 2, shape[0] // 2 + 20), slice(4, 28)
        mask[rows], mask[:, cols] = False, False
        return BlockPattern.from_mask(mask, block)

    return make


CASES = [
    Case("square unstructured", _random((64, 64), 0.2)),
    Case("square blocks of 16", _random((64, 64), 0.5, 16)),
    Case("wide unstructured", _random((149, 698), 0.1)),
    Case("wide unstructured, denser", _random((149, 698), 0.4)),
    Case("tall blocks of 32x16", _random((640, 149), 0.3, (32, 16))),
    Case("149x698 by 16", _random((149, 698), 0.25, 16)),
    Case("497x1280 by 32", _random((497, 1280), 0.2, 32)),
    Case("640x3081 by 16x32", _random((640, 3081), 0.15, (16, 32)), (9,)),
    Case("497x698 by 32x16", _random((497, 698), 0.25, (32, 16))),
    Case("odd blocks of 7x5", _random((50, 33), 0.5, (7, 5))),
    Case("one block", _random((48, 40), 1.0, (48, 40))),
    Case("density 1, unstructured", _random((30, 20), 1.0)),
    Case("density 1, blocks", _random((96, 64), 1.0, 32)),
    Case("density 0, unstructured", _random((30, 20), 0.0)),
    Case("density 0, blocks", _random((96, 64), 0.0, 16)),
    Case("empty rows and columns, unstructured", _holes((90, 130))),
    Case("empty rows and columns, blocks of 4", _holes((90, 130), 4)),
    Case("block-diagonal", lambda: BlockPattern.block_diagonal(5, (8, 12))),
    Case("banded", lambda: BlockPattern.banded((70, 50), 2, 6)),
    Case("batch 0", _random((64, 48), 0.3, 16), (0,)),
    Case("batch 0, unstructured", _random((64, 48), 0.1), (0,)),
    Case("batch 1", _random((64, 48), 0.3, 16), (1,)),
    Case("batch 3, unstructured", _random((64, 48), 0.1), (3,)),
    Case("1-D input", _random((64, 48), 0.3, 8), ()),
    Case("1-D input, unstructured", _random((64, 48), 0.1), ()),
    Case("3-D input", _random((64, 48), 0.3, 8), (2, 5)),
    Case("5-D input, unstructured", _random((33, 48), 0.1), (2, 1, 3, 2)),
]

# (num_blocks, i, o), leading dimensions
BLOCK_DIAG_CASES = [
    ((1, 40, 24), (16,)),
    ((4, 16, 16), (24,)),
    ((4, 8, 32), (2, 5)),
    ((16, 33, 7), (9,)),
    ((3, 64, 96), (0,)),
    ((3, 64, 96), (1,)),
    ((8, 1, 1), (3,)),
    ((5, 12, 20), ()),
    ((2, 12, 20), (2, 1, 3, 2)),
]


def normal(seed: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def inputs(case: Case, pattern: BlockPattern, dtype) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(x, blocks, bias, dy) of a case, blocks zero beyond the matrix's edge."""
    ones = np.ones((1, pattern.shape[0])), np.ones((1, pattern.shape[1]))
    blocks = jnp.asarray(
        np.asarray(normal(1, pattern.values_shape, dtype)) * reference.sddmm(*ones, pattern).astype(dtype)
    )
    x, dy = normal(0, (*case.batch, pattern.shape[0]), dtype), normal(3, (*case.batch, pattern.shape[1]), dtype)
    return x, blocks, normal(2, (pattern.shape[1],), dtype), dy


def value_and_gradients(f, x, weight, bias, dy) -> dict[str, jax.Array]:
    """y = f(x, weight, bias) and its three gradients for the cotangent `dy`."""
    y, pullback = jax.vjp(f, x, weight, bias)
    return dict(zip(("y", "dx", "dW", "db"), (y, *pullback(dy)), strict=True))


def true_products(x, blocks, bias, dy, pattern: BlockPattern) -> dict[str, np.ndarray]:
    """The same of y = xW + b, in float64 by the oracle."""
    dy = np.asarray(dy, np.float64)
    return {
        "y": reference.spmm(x, blocks, pattern) + np.asarray(bias, np.float64),
        "dx": reference.spmm(dy, blocks, pattern.T),
        "dW": reference.sddmm(x, dy, pattern),
        "db": dy.reshape(-1, dy.shape[-1]).sum(0),
    }


def dense_products(x, blocks, bias, dy, pattern: BlockPattern) -> dict[str, jax.Array]:
    """The same by JAX's dense product in the dtype of `x`: what sets the allowed error.

    W is stored once by rows, as Flax does, and once by columns, as PyTorch does; each result is the less exact one.
    XLA sums the two in different orders: `dx` of a (149, 698) matrix errs by 1.3e-5 or by 3.8e-5 (JAX 0.12.0.1, CPU).
    """
    w = reference.densify(blocks, pattern).astype(x.dtype)
    truth = true_products(x, blocks, bias, dy, pattern)
    both = _by_dense(x, w, bias, dy, pattern), _by_dense(x, w.T, bias, dy, pattern, by_columns=True)
    return {name: max((d[name] for d in both), key=lambda d: _error(d, true)) for name, true in truth.items()}


@functools.partial(jax.jit, static_argnames="by_columns")
def _by_dense(x, w, bias, dy, pattern, *, by_columns=False):
    product = (lambda x, w, b: x @ w.T + b) if by_columns else (lambda x, w, b: x @ w + b)
    dense = value_and_gradients(product, x, w, bias, dy)
    return {**dense, "dW": pattern.gather(dense["dW"].T if by_columns else dense["dW"])}


def _error(value, truth) -> float:
    return np.abs(np.asarray(value, np.float64) - truth).max(initial=0)


def assert_as_close_as_dense(got, truth, dense, what: str = "result") -> None:
    """Asserts that `got` errs at most twice as much as the dense product does in the same dtype.

    Errors are the largest absolute ones against `truth`; below 4 ulp of the largest true value nothing is asked.
    """
    truth, errors = np.asarray(truth, np.float64), []
    for name, value in ((what, got), ("dense " + what, dense)):
        assert value.dtype == dense.dtype, f"{name} is {value.dtype}, the dense product's is {dense.dtype}"
        assert value.shape == truth.shape, f"{name} has shape {value.shape}, the truth has {truth.shape}"
        errors.append(_error(value, truth))
    allowed = _allowed(dense, truth)
    assert errors[0] <= allowed, f"{what} is off by {errors[0]:.3g}, allowed {allowed:.3g} (dense: {errors[1]:.3g})"


def assert_rounded_once(got, truth, sums, what: str = "result") -> None:
    """Asserts that `got` are sums in a wider dtype, rounded once: stricter than the above where `got` is of 16 bits.

    Every number may be off by an ulp of its own true value, beyond what `assert_as_close_as_dense` allows the sums.

    Args:
      sums: the dense product in the dtype that is summed in, not rounded.
    """
    truth = np.asarray(truth, np.float64)
    assert got.shape == truth.shape, f"{what} has shape {got.shape}, the truth has {truth.shape}"
    allowed = float(jnp.finfo(got.dtype).eps) * np.abs(truth) + _allowed(sums, truth)
    off = np.abs(np.asarray(got, np.float64) - truth)
    assert (off <= allowed).all(), (
        f"{what} is off by {off.max():.3g}: {(~(off <= allowed)).sum()} numbers by more than a rounding of their own"
    )


def _allowed(dense, truth: np.ndarray) -> float:
    """Twice the error of the dense product, and at least 4 ulp of the largest true value."""
    return max(2 * _error(dense, truth), 4 * float(jnp.finfo(dense.dtype).eps) * np.abs(truth).max(initial=0))
