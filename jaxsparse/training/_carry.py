"""Which leaves of an optimizer's state belong to a weight, and how they move with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsparse.training._replicas import laid_as, unsharded

Path = str | tuple[str, ...] | None


def take(values: Array, source: Int[Array, " new"]) -> Array:
    """values[source], zero where the source is past the end."""
    values = jnp.asarray(values)
    taken = unsharded(values).at[source].get(mode="fill", fill_value=0)
    return laid_as(taken, values) if taken.shape == values.shape else taken


def take_state(opt_state: Any, source: Int[Array, " new"], shape: tuple[int, ...], path: Path) -> Any:
    """`take` of every leaf that belongs to a weight of this shape, the others as they are.

    Those are the leaves of its shape, and of its shape less a block's rows or columns, as Adafactor's factors are.

    Args:
      path: the weight's own path, which the path of a leaf must hold; needed where several weights have this shape.
    """
    shapes = {shape, shape[:2], shape[::2]} if len(shape) == 3 else {shape}
    names = tuple(path.replace("/", ".").split(".")) if isinstance(path, str) else path
    leaves, tree = jax.tree_util.tree_flatten_with_path(opt_state)
    fitting = [k for k, (_, leaf) in enumerate(leaves) if jnp.shape(leaf) in shapes]
    moving = [k for k in fitting if names is None or _holds(leaves[k][0], names)]
    _check([leaves[k][0] for k in moving], [leaves[k][0] for k in fitting], shape, path)
    return jax.tree.unflatten(tree, [take(leaf, source) if k in moving else leaf for k, (_, leaf) in enumerate(leaves)])


def _check(moving: list, fitting: list, shape: tuple[int, ...], path: Path) -> None:
    if fitting and not moving:
        found = ", ".join(map(jax.tree_util.keystr, fitting))
        raise ValueError(f"path={path!r} is in none of the leaves of shape {shape} in opt_state: {found}.")
    for other in moving[1:]:
        depth, a = next((k, a) for k, (a, b) in enumerate(zip(moving[0], other, strict=False)) if a != b)
        # In a field of Optax's named tuples, a dict with two keys holds two parameters. A state that was turned into
        # dicts, as `nnx.state` does, has none of those: there only a path can tell a moment from a parameter.
        inside = any(isinstance(key, jax.tree_util.GetAttrKey) for key in moving[0][:depth])
        if isinstance(a, jax.tree_util.DictKey) and (inside or path is None):
            pair = " and ".join(map(jax.tree_util.keystr, (moving[0], other)))
            raise ValueError(
                f"opt_state holds several parameters of shape {shape}, {pair}: say which one moves, "
                f"as path={_name(a)!r} or with all of its keys."
            )


def _holds(keys, names: tuple[str, ...]) -> bool:
    own = [_name(key) for key in keys]
    return any(tuple(own[k : k + len(names)]) == names for k in range(len(own) - len(names) + 1))


def _name(key) -> str:
    return str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))
