"""The public products: what they mean, and what they refuse. `jaxsparse.products` has them as JAX primitives."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse import _backends, products
from jaxsparse._xla import ACTIVATIONS
from jaxsparse.formats import BlockPattern, NMPattern
from jaxsparse.products import n_m

Activation = str | Callable[[jax.Array], jax.Array] | None
_PRODUCTS = {  # of each format: (spmm, sddmm)
    BlockPattern: (products.spmm, products.sddmm),
    NMPattern: (n_m.spmm, n_m.sddmm),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


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
      TypeError: for operands that are no arrays, such as lists.
      ValueError: for shapes or dtypes that do not fit, an unknown activation or back end.
    Source: the block-diagonal factors of Monarch, Dao et al. 2022, arXiv:2204.00595.
    """
    _check_arrays("block_diag_matmul", x=x, blocks=blocks, bias=bias)
    if jnp.ndim(blocks) != 3:
        raise ValueError(f"blocks must be [num_blocks, i, o], got shape {jnp.shape(blocks)}.")
    n, i, o = blocks.shape
    _check_features(x, n * i, f"{n} blocks of {i} inputs: {n} x {i} = {n * i}")
    _check_call(x, {"blocks": blocks}, bias, n * o, backend)
    name, after = _activation(activation)
    y = products.block_diag_matmul(x, blocks, bias, activation=name, precision=precision, backend=backend)
    return after(y) if after else y


def spmm(
    x: Float[Array, "*batch in"],
    blocks: Float[Array, " *values"],
    pattern: BlockPattern | NMPattern,
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
      TypeError: for operands that are no arrays, such as lists.
      ValueError: for shapes or dtypes that do not fit, an unknown activation or back end.
    Source: block-sparse products as in Gray, Radford, Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """
    _check_arrays("spmm", x=x, blocks=blocks, bias=bias)
    _check_pattern(pattern)
    _check_features(x, pattern.shape[0], f"the pattern's matrix is {pattern.shape} (in, out)")
    pattern.check_values(blocks)
    _check_call(x, {"blocks": blocks}, bias, pattern.shape[1], backend)
    name, after = _activation(activation)
    how = {"activation": name, "precision": precision, "backend": backend, **pattern.sizes}
    product, _ = _PRODUCTS[type(pattern)]
    y = product(x, blocks, pattern.index, bias, **how)
    return after(y) if after else y


def sddmm(
    x: Float[Array, "*batch in"],
    dy: Float[Array, "*batch out"],
    pattern: BlockPattern | NMPattern,
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
      TypeError: for operands that are no arrays, such as lists.
      ValueError: for shapes or dtypes that do not fit, or an unknown back end.
    """
    _check_arrays("sddmm", x=x, dy=dy)
    _check_pattern(pattern)
    _check_features(x, pattern.shape[0], f"the pattern's matrix is {pattern.shape} (in, out)")
    _check_features(dy, pattern.shape[1], f"the pattern's matrix is {pattern.shape} (in, out)", "dy")
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x and dy must share their leading dimensions, got {x.shape} and {dy.shape}.")
    _check_call(x, {"dy": dy}, None, 0, backend)
    _, product = _PRODUCTS[type(pattern)]
    return product(x, dy, pattern.index, precision=precision, backend=backend, **pattern.sizes)


# ---- checks ------------------------------------------------------------------------------------------------


def _check_arrays(op: str, **operands) -> None:
    """Raises TypeError for operands that are no arrays, as `jnp.dot` does: lists are not made arrays silently."""
    for name, operand in operands.items():
        if operand is not None and not hasattr(getattr(operand, "dtype", None), "name"):
            kind = f"{type(operand).__module__}.{type(operand).__qualname__}".removeprefix("builtins.")
            raise TypeError(
                f"{op} requires arrays, got {kind} for {name}. Make it one, as by jax.numpy.asarray({name})."
            )


def _check_pattern(pattern) -> None:
    if type(pattern) not in _PRODUCTS:
        known = " or ".join(kind.__name__ for kind in _PRODUCTS)
        raise ValueError(f"pattern is a {type(pattern).__name__}, not a {known}; from_mask makes one of a mask.")
    if pattern.stacked:
        raise ValueError(
            f"the pattern's arrays carry {pattern.stacked} leading axes, as scan and vmap stack them: "
            "take one layer of it with jax.tree.map(lambda a: a[k], pattern), or call under the same vmap."
        )


def _check_features(x, features: int, why: str, name: str = "x") -> None:
    if jnp.ndim(x) == 0 or jnp.shape(x)[-1] != features:
        raise ValueError(
            f"{name} of shape {jnp.shape(x)} must have {features} features in its last dimension, as {why}."
        )


def _check_call(x, others: dict, bias, out: int, backend) -> None:
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


def _activation(activation: Activation) -> tuple[str | None, Callable[[jax.Array], jax.Array] | None]:
    """The activation by the name that kernels know, or as a function of the result."""
    if callable(activation):
        return None, activation
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"unknown activation {activation!r}: give {known}, a function, or None.")
    return activation, None
