"""Which parameters weight decay acts on: by what they are, not by how many dimensions they have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.formats import PATTERNS

_NEVER = ("bias", "scale")  # what Flax's layers and norms call them


def decay_mask(params: Any) -> Any:
    """True where weight decay belongs: a mask for Optax, of the structure of `params`.

    The usual rule, two dimensions or more, leaves out the kernel [nnz] of an unstructured layer, and takes in the
    biases of layers that `nn.scan` or `nnx.vmap` stacked. This one goes by the role:

    - a leaf called "kernel" decays, whatever its rank, and so do values beside their pattern: in one dict, tuple
      or other node, with a shape that ends in the pattern's `values_shape`;
    - a leaf called "bias" or "scale" does not, nor do integers and patterns;
    - any other decays if it has two dimensions or more.

    Args:
      params: Linen's parameters, an `nnx.State`, or any pytree; in boxes of `nn.with_partitioning` too. Optax calls it:
        `optax.adamw(rate, weight_decay=0.1, mask=jaxsparse.decay_mask)`.
    """
    values = _values_of_patterns(params)

    def decays(path, leaf) -> bool:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return False
        _, name = _place(path)
        if name in _NEVER:
            return False
        return name == "kernel" or path in values or jnp.ndim(leaf) >= 2

    return jax.tree.map_with_path(decays, params)


def _values_of_patterns(params: Any) -> set:
    """The paths of the leaves that stand beside a pattern whose values they may be."""
    shapes, others = {}, []
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, PATTERNS)):
        node, _ = _place(path)
        if isinstance(leaf, PATTERNS):
            shapes.setdefault(node, []).append(leaf.values_shape)
        else:
            others.append((path, node, jnp.shape(leaf)))
    return {path for path, node, shape in others if any(shape[-len(s) :] == s for s in shapes.get(node, ()))}


def _place(path: tuple) -> tuple[tuple, Any]:
    """The path of the node that a leaf is in, and its name there; a box, or an NNX variable, is no node."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    key = path[-1] if path else None
    return path[:-1], getattr(key, "key", getattr(key, "name", None))
