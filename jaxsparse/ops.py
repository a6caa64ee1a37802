"""The public products and their derivative rules.

The products are closed under differentiation: every rule below calls the ops of this file, so back ends have
forward kernels only, and gradients of gradients are free. Forward-mode derivatives (`jax.jvp`) are not defined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse import _backends
from jaxsparse._xla import ACTIVATIONS, wide
from jaxsparse.formats import BlockPattern

Activation = str | Callable[[jax.Array], jax.Array] | None
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class _How(NamedTuple):
    """What is static about a call."""

    activation: str | None = None
    precision: jax.lax.PrecisionLike = None
    backend: str | None = None
    transposed: bool = False

    @property
    def plain(self) -> _How:
        return self._replace(activation=None)


# ---- public ---------------------------------------------------------------------------------------


def block_diag_matmul(
    x: Float[Array, "*batch n*i"],
    blocks: Float[Array, "n i o"],
    bias: Float[Array, " n*o"] | None = None,
    *,
    activation: Activation = None,
    precision: jax.lax.PrecisionLike = None,
    backend: str | None = None,
) -> Float[Array, "*batch n*o"]:
    """Multiplies `x` by a block-diagonal matrix: slice n of `x` meets block n only.

        y[..., n, o] = activation(sum_i  x[..., n, i] * blocks[n, i, o]  +  bias[n, o])

    Args:
      x: input, of any leading dimensions; its features must number n*i.
      blocks: the n diagonal blocks, each mapping i features to o, in the dtype of `x`.
      bias: added to the sum, in the dtype of `x`.
      activation: "relu", "gelu" (tanh form, as `jax.nn.gelu`), "silu", or a function of y.
      precision: as in `jax.lax.dot`.
      backend: a back end by name, which then runs or raises; None picks the best.
    Returns:
      y in the dtype of `x`. Sums run in float32 or wider, so half inputs round once.
    Raises:
      ValueError: for shapes or dtypes that do not fit, an unknown activation or back end.
    Source: the block-diagonal factors of Monarch, Dao et al. 2022, arXiv:2204.00595.
    """
    if jnp.ndim(blocks) != 3:
        raise ValueError(f"blocks must be [num_blocks, i, o], got shape {jnp.shape(blocks)}.")
    n, i, o = blocks.shape
    _check_features(x, n * i, f"{n} blocks of {i} inputs: {n} x {i} = {n * i}")
    how, after = _check_call(x, {"blocks": blocks}, bias, n * o, activation, precision, backend)
    y: Any = _block_diag(how, x.reshape(math.prod(x.shape[:-1]), n * i), blocks, bias)
    return after(y.reshape(*x.shape[:-1], n * o))


def spmm(
    x: Float[Array, "*batch in"],
    blocks: Float[Array, " *values"],
    pattern: BlockPattern,
    bias: Float[Array, " out"] | None = None,
    *,
    activation: Activation = None,
    precision: jax.lax.PrecisionLike = None,
    backend: str | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies `x` by a sparse matrix W whose blocks, or single entries, are stored where `pattern` says.

        y = activation(x W + bias)

    Args:
      x: input, of any leading dimensions; features must equal `pattern.shape[0]`.
      blocks: the stored values, of shape `pattern.values_shape` and the dtype of `x`.
      pattern: where they are. `pattern.T` multiplies by the transpose with the same `blocks`.
      bias: [out], added to the sum, in the dtype of `x`.
      activation: "relu", "gelu" (tanh form, as `jax.nn.gelu`), "silu", or a function of y.
      precision: as in `jax.lax.dot`.
      backend: a back end by name, which then runs or raises; None picks the best.
    Returns:
      y in the dtype of `x`. Sums run in float32 or wider, so half inputs round once.
    Raises:
      ValueError: for shapes or dtypes that do not fit, an unknown activation or back end.
    Source: block-sparse products as in Gray, Radford, Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    _check_pattern(pattern)
    _check_features(x, pattern.shape[0], f"the pattern's matrix is {pattern.shape} (in, out)")
    pattern.check_values(blocks)
    how, after = _check_call(x, {"blocks": blocks}, bias, pattern.shape[1], activation, precision, backend)
    y: Any = _spmm(how, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), blocks, bias, pattern)
    return after(y.reshape(*x.shape[:-1], pattern.shape[1]))


def sddmm(
    x: Float[Array, "*batch in"],
    dy: Float[Array, "*batch out"],
    pattern: BlockPattern,
    *,
    precision: jax.lax.PrecisionLike = None,
    backend: str | None = None,
) -> Float[Array, " *values"]:
    """The sampled product: x^T dy, summed over all leading dimensions, only where `pattern` stores it.

    This is the gradient of `spmm` with respect to `blocks`: O(nnz), and zero beyond the matrix's edge.

    Args:
      x: [..., in] and `dy` [..., out], of one dtype and the same leading dimensions.
      pattern: which blocks to compute.
      precision: as in `jax.lax.dot`.
      backend: a back end by name, which then runs or raises; None picks the best.
    Returns:
      values of shape `pattern.values_shape` in the dtype of `x`.
    Raises:
      ValueError: for shapes or dtypes that do not fit, or an unknown back end.
    """
    _check_pattern(pattern)
    _check_features(x, pattern.shape[0], f"the pattern's matrix is {pattern.shape} (in, out)")
    _check_features(dy, pattern.shape[1], f"the pattern's matrix is {pattern.shape} (in, out)", "dy")
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x and dy must share their leading dimensions, got {x.shape} and {dy.shape}.")
    how, _ = _check_call(x, {"dy": dy}, None, 0, None, precision, backend)
    rows = math.prod(x.shape[:-1])
    return _sddmm(how, x.reshape(rows, x.shape[-1]), dy.reshape(rows, dy.shape[-1]), pattern)


def _product(function: Callable[..., Any]) -> Any:
    """A product with rules of its own; jitted, so that it is one program outside jit too. `how` comes first."""
    return jax.custom_vjp(jax.jit(function, static_argnums=(0,), inline=True), nondiff_argnums=(0,))


# ---- spmm and sddmm: each is the other's derivative --------------------------------------------------


@_product
def _spmm(how, x, blocks, bias, pattern):
    sizes, operands = _stored(pattern), (x, blocks, pattern.index, bias)
    options = {"transposed": pattern.transposed, "activation": how.activation, "precision": how.precision}
    return _backends.call("spmm", how.backend, sizes["block"], *operands, **sizes, **options)


def _spmm_fwd(how, x, blocks, bias, pattern):
    z = _spmm(how.plain, x, blocks, bias, pattern)
    return _activate(how, z), (x, blocks, bias, pattern, z if how.activation else None)


# y = f(z), z = xW + b gives dz = dy f'(z); then dx = dz W^T, dW = x^T dz where W is stored, db = sum of dz.
# Those of an unstructured W are one op: a kernel then gathers dz once for the two, where both are wanted.
def _spmm_bwd(how, saved, dy):
    x, blocks, bias, pattern, z = saved
    dz, how = _through_activation(how, z, dy), how.plain
    if pattern.block == (1, 1) and not pattern.transposed:
        dx, dw = _spmm_grads(how, x, dz, blocks, pattern)
    else:
        dx = _spmm(how, dz, blocks, None, pattern.T)  # a view: nothing moves
        dw = _sddmm(how, x, dz, pattern)
    return dx, dw, _bias_gradient(bias, dz), None  # None: integers have no gradient


_spmm.defvjp(_spmm_fwd, _spmm_bwd)


@_product
def _sddmm(how, x, dy, pattern):
    if pattern.transposed:  # (x^T dy)^T = dy^T x, and values stay as stored
        x, dy, pattern = dy, x, pattern.T
    sizes, operands = _stored(pattern), (x, dy, pattern.index)
    return _backends.call("sddmm", how.backend, sizes["block"], *operands, **sizes, precision=how.precision)


def _sddmm_fwd(how, x, dy, pattern):
    return _sddmm(how, x, dy, pattern), (x, dy, pattern)


# g = sampled(x^T dy) is linear in each: with the cotangent G as a sparse matrix, dx = dy G^T and d(dy) = x G.
def _sddmm_bwd(how, saved, g):
    x, dy, pattern = saved
    return _spmm(how, dy, g, None, pattern.T), _spmm(how, x, g, None, pattern), None


_sddmm.defvjp(_sddmm_fwd, _sddmm_bwd)


@_product
def _spmm_grads(how, x, dy, blocks, pattern):
    sizes, operands = _stored(pattern), (x, dy, blocks, pattern.index)
    return _backends.call("spmm_grads", how.backend, sizes["block"], *operands, **sizes, precision=how.precision)


def _spmm_grads_fwd(how, x, dy, blocks, pattern):
    return _spmm_grads(how, x, dy, blocks, pattern), (x, dy, blocks, pattern)


# (dx, dW) = (dy W^T, sampled(x^T dy)), with cotangents (a, G): the rules of `_spmm` and `_sddmm`, added up.
def _spmm_grads_bwd(how, saved, cotangents):
    (x, dy, blocks, pattern), (a, g) = saved, cotangents
    for_dy = _spmm(how, a, blocks, None, pattern) + _spmm(how, x, g, None, pattern)
    return _spmm(how, dy, g, None, pattern.T), for_dy, _sddmm(how, a, dy, pattern), None


_spmm_grads.defvjp(_spmm_grads_fwd, _spmm_grads_bwd)


# ---- the block-diagonal pair ---------------------------------------------------------------------------


@_product
def _block_diag(how, x, blocks, bias):
    options = {"transposed": how.transposed, "activation": how.activation, "precision": how.precision}
    return _backends.call("block_diag_matmul", how.backend, blocks.shape[1:], x, blocks, bias, **options)


def _block_diag_fwd(how, x, blocks, bias):
    z = _block_diag(how.plain, x, blocks, bias)
    return _activate(how, z), (x, blocks, bias, z if how.activation else None)


# As for `spmm`. Where the blocks are read transposed, y = x W^T, the roles of x and dz swap: dW = dz^T x.
def _block_diag_bwd(how, saved, dy):
    x, blocks, bias, z = saved
    dz, how = _through_activation(how, z, dy), how.plain
    dx = _block_diag(how._replace(transposed=not how.transposed), dz, blocks, None)
    outer = (dz, x) if how.transposed else (x, dz)
    return dx, _block_diag_outer(how, blocks.shape[0], *outer), _bias_gradient(bias, dz)


_block_diag.defvjp(_block_diag_fwd, _block_diag_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _block_diag_outer(how, num_blocks, x, dy):
    block = (x.shape[1] // num_blocks, dy.shape[1] // num_blocks)
    options = {"num_blocks": num_blocks, "precision": how.precision}
    return _backends.call("block_diag_outer", how.backend, block, x, dy, **options)


def _block_diag_outer_fwd(how, num_blocks, x, dy):
    return _block_diag_outer(how, num_blocks, x, dy), (x, dy)


def _block_diag_outer_bwd(how, num_blocks, saved, g):
    x, dy = saved
    forward = how._replace(transposed=False)
    return _block_diag(how._replace(transposed=True), dy, g, None), _block_diag(forward, x, g, None)


_block_diag_outer.defvjp(_block_diag_outer_fwd, _block_diag_outer_bwd)


# ---- what the rules share --------------------------------------------------------------------------------


def _stored(pattern: BlockPattern) -> dict[str, tuple[int, int]]:
    stored = pattern.T if pattern.transposed else pattern
    return {"shape": stored.shape, "block": stored.block}


def _activate(how: _How, z):
    if how.activation is None:
        return z
    return ACTIVATIONS[how.activation](z.astype(wide(z.dtype))).astype(z.dtype)


def _through_activation(how: _How, z, dy):
    if how.activation is None:
        return dy
    return jax.vjp(functools.partial(_activate, how), z)[1](dy)[0]


def _bias_gradient(bias, dz):
    if bias is None:
        return None
    return dz.sum(0, dtype=wide(dz.dtype)).astype(dz.dtype)


# ---- checks ------------------------------------------------------------------------------------------------


def _check_pattern(pattern) -> None:
    if not isinstance(pattern, BlockPattern):
        raise ValueError(
            f"pattern is a {type(pattern).__name__}, not a BlockPattern; BlockPattern.from_mask makes one of a mask."
        )
    if jnp.ndim(pattern.row_index) != 1:
        raise ValueError(
            f"the pattern's arrays carry {jnp.ndim(pattern.row_index) - 1} leading axes, as scan and vmap stack them: "
            "take one layer of it with jax.tree.map(lambda a: a[k], pattern), or call under the same vmap."
        )


def _check_features(x, features: int, why: str, name: str = "x") -> None:
    if jnp.ndim(x) == 0 or jnp.shape(x)[-1] != features:
        raise ValueError(
            f"{name} of shape {jnp.shape(x)} must have {features} features in its last dimension, as {why}."
        )


def _check_call(x, others: dict, bias, out: int, activation, precision, backend) -> tuple[_How, Callable[[Any], Any]]:
    """The static part of a checked call, and what to do to its result (an activation given as a function)."""
    if bias is not None:
        others = {**others, "bias": bias}
        if jnp.shape(bias) != (out,):
            raise ValueError(f"bias of shape {jnp.shape(bias)} must be ({out},), one number per output.")
    if x.dtype.name not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, but the products are defined for {', '.join(_DTYPES)}; cast it first.")
    for name, other in others.items():
        if other.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} and {name} {other.dtype}: nothing is cast silently. Cast one of them, "
                f"for example {name}.astype(x.dtype); the Flax layers do so by their dtype argument."
            )
    _backends.check_name(backend)
    if callable(activation):
        return _How(None, precision, backend), activation
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"unknown activation {activation!r}: give {known}, a function, or None.")
    return _How(activation, precision, backend), lambda y: y
