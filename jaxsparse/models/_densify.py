"""Sparse Flax models made dense again: the way out of `surgery`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse import linen as sparse_linen
from jaxsparse import nnx as sparse_nnx
from jaxsparse._xla import ACTIVATIONS
from jaxsparse.formats import BlockPattern
from jaxsparse.models import _kept

_LINEN = (sparse_linen.BlockDiagDense, sparse_linen.BlockSparseDense, sparse_linen.SparseDense)
_NNX = (sparse_nnx.BlockDiagLinear, sparse_nnx.BlockSparseLinear)  # of which SparseLinear is one


def densify(model: nnx.Module) -> nnx.Module:
    """A copy of an NNX model with `nnx.Linear` layers in the place of all sparse ones, zeros stored as zeros.

    A layer with an activation becomes an `nnx.Sequential` of the Linear and that.

    Raises:
      ValueError: with the path, for layers that `nnx.vmap` or `nnx.scan` stacked.
    """

    def put(path, node):
        if not isinstance(node, _NNX):
            return node
        try:
            return _nnx_linear(node)
        except ValueError as error:
            raise ValueError(f"{'.'.join(map(str, path))}: {error}") from None

    return nnx.recursive_map(put, nnx.clone(model))


def densify_variables(model: linen.Module, variables: Mapping[str, Any], *args, **kwargs) -> dict[str, Any]:
    """Variables of a sparse Linen model as those of the dense one: `nn.Dense` at the same paths, zeros as zeros.

        sparse = sparsify_linen(dense, rules)
        dense.apply(densify_variables(sparse, variables, x), x)

    Args:
      model: from `sparsify_linen`, or any with layers of ours. What activations they have, the dense model needs too.
      variables: of it.
      args, kwargs: an input for the model, which tells where its layers are; nothing is computed with it.
    Raises:
      ValueError: with the path, for layers that `nn.vmap` or `nn.scan` stacked.
    """
    found: set[tuple[str, ...]] = set()

    def note(next_call, args, kwargs, context):
        if isinstance(context.module, _LINEN) and context.method_name == "__call__":
            found.add(tuple(context.module.path))
        return next_call(*args, **kwargs)

    with linen.intercept_methods(note):
        jax.eval_shape(lambda: model.apply(variables, *args, **kwargs, mutable=True))
    params: dict[tuple[str, ...], Any] = dict(flatten_dict(variables["params"]))  # pyright: ignore[reportArgumentType]
    patterns: dict[tuple[str, ...], Any] = dict(flatten_dict(variables.get("pattern", {})))
    for path in found:
        pattern = patterns.pop((*path, "pattern"), None)
        try:
            params[*path, "kernel"] = _dense(params[*path, "kernel"], pattern)
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)}: {error}") from None
    new = {**variables, "params": unflatten_dict(params), "pattern": unflatten_dict(patterns)}
    return new if patterns else {name: v for name, v in new.items() if name != "pattern"}


def _dense(values: jax.Array, pattern: BlockPattern | None) -> jax.Array:
    """The (in, out) kernel of stored values, of a block-diagonal layer where there is no pattern."""
    if jnp.ndim(values) != (3 if pattern is None else len(pattern.values_shape)):
        raise ValueError(
            f"its kernel has shape {jnp.shape(values)}, as layers that vmap or scan stacked: take one's out first."
        )
    return _kept.densify(values, pattern)


def _nnx_linear(layer: Any) -> nnx.Module:
    pattern = layer.pattern.get_value() if hasattr(layer, "pattern") else None
    kernel = _dense(layer.kernel[...], pattern)
    options = {name: getattr(layer, name) for name in ("use_bias", "dtype", "param_dtype", "precision")}
    linear = nnx.Linear(*kernel.shape, **options, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    if layer.bias is not None and linear.bias is not None:
        linear.bias[...] = layer.bias[...]
    if layer.activation is None:
        return linear
    return nnx.Sequential(linear, ACTIVATIONS.get(layer.activation, layer.activation))
