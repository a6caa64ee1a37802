"""What to prune, how much of each layer, and when: scores, densities, schedules, and masks on dense weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxsparse._norms import squares_of_blocks
from jaxsparse._sizes import as_pair, count_kept, grid_of, is_unstructured
from jaxsparse.training import _select

Schedule = Callable[[Any], Any]

# ---- scores ---------------------------------------------------------------------------------------


def score(
    name: str,
    w: Float[Array, "in out"],
    *,
    grad: Any = None,
    x: Any = None,
    key: Any = None,
    block: int | tuple[int, int] = (1, 1),
) -> Float[Array, "grid_in grid_out"]:
    """How much every block, or single entry, of a dense weight matters: the higher, the rather it is kept.

        "magnitude"  |w|                "wanda"   |w| ||x_in||, the norm over all leading dimensions of x
        "saliency"   |w grad|           "random"  uniform in [0, 1)

    The score of a block is the L2 norm of its entries' scores; at random it is drawn once for the block.

    Args:
      w: the dense weight. `grad`, for "saliency": [in, out]. `x`, for "wanda": [..., in], inputs of the layer.
      key: a PRNG key, for "random".
      block: (i, o), or b for (b, b); blocks that stick out over the edge count what is inside.
    Returns:
      float32 [grid_in, grid_out], as `BlockPattern.from_dense` and `top_mask` take it.
    Raises:
      ValueError: for an unknown name, or where the array that it needs is missing or of another shape.
    Source: magnitude, Han et al. 2015, arXiv:1506.02626; saliency, the first-order term of SNIP, Lee et al. 2019,
      arXiv:1810.02340; Wanda, Sun et al. 2024, arXiv:2306.11695.
    """
    needs = {"magnitude": None, "saliency": ("grad", grad), "wanda": ("x", x), "random": ("key", key)}
    if name not in needs:
        raise ValueError(f"unknown score {name!r}: there is {', '.join(map(repr, needs))}.")
    if needs[name] is not None and needs[name][1] is None:
        raise ValueError(f"the score {name!r} needs {needs[name][0]}=.")
    block = as_pair(block)
    if name == "random":
        return jax.random.uniform(key, grid_of((w.shape[0], w.shape[1]), block))
    entries = jnp.abs(jnp.asarray(w, jnp.float32))
    if name == "saliency":
        _check_shape("grad", grad, w.shape)
        entries = jnp.abs(entries * jnp.asarray(grad, jnp.float32))
    elif name == "wanda":
        x = jnp.asarray(x, jnp.float32)
        _check_shape("x", x, (*x.shape[:-1], w.shape[0]))
        squares = jnp.square(x).reshape(-1, w.shape[0])
        entries = entries * jnp.sqrt(squares.sum(0))[:, None]
    return entries if is_unstructured(block) else jnp.sqrt(squares_of_blocks(entries, block))


def top_mask(
    scores: Float[Array, "*any"], density: Any = None, *, n_of_m: tuple[int, int] | None = None
) -> Bool[Array, "*any"]:
    """Marks the round(density * size) highest scores, or n of every m inputs; of equal ones the earlier, row by row.

    Scores count in float32.

    Args:
      density: may be traced, as from a schedule, so that one program serves a whole run.
      n_of_m: (n, m) instead, as (2, 4): the n highest of every m neighbours along the first axis, the inputs, which is
        how sparse tensor cores have them for y = xW.
    Raises:
      ValueError: for none or both of the two, for a density, where it is a number, outside [0, 1], and for inputs that
        are no whole number of groups.
    Source: N:M sparsity, Mishra et al. 2021, arXiv:2104.08378.
    """
    if (density is None) == (n_of_m is None):
        raise ValueError(f"give one of density and n_of_m, got {density} and {n_of_m}.")
    if n_of_m is not None:
        return _highest_of_groups(jnp.asarray(scores), *n_of_m)
    size = jnp.size(scores)
    traced = isinstance(density, jax.Array)
    count = jnp.round(density * size) if traced else count_kept(density, size)
    key = _select.keys(jnp.asarray(scores)).reshape(-1)
    return _select.highest(key, jnp.asarray(count, jnp.int32)).reshape(jnp.shape(scores))


def _highest_of_groups(scores: Float[Array, "in *any"], n: int, m: int) -> Bool[Array, "in *any"]:
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n_of_m=({n}, {m}) must be two integers with 0 <= n <= m and m >= 1.")
    if scores.ndim == 0 or scores.shape[0] % m:
        raise ValueError(
            f"scores of shape {scores.shape} have no whole number of groups of {m} along their first axis."
        )
    key = _select.keys(scores).reshape(-1, m, *scores.shape[1:])
    best_first = jnp.argsort(~key, axis=1, stable=True)
    return (jnp.argsort(best_first, axis=1) < n).reshape(scores.shape)


def top_k(
    w: Float[Array, "in out"], density, *, block: int | tuple[int, int] = (1, 1), straight_through: bool = False
) -> Float[Array, "in out"]:
    """A dense weight of which only the entries, or blocks, of largest magnitude are left, chosen anew at every call.

    The gradient reaches the entries that are kept; with `straight_through` it passes to all, as if nothing had been
    pruned, so that an entry can grow back.

    Args:
      w: the dense weight.
      density: the fraction *kept*, which may be traced.
      block: prunes whole blocks, by their L2 norm.
    Source: the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432.
    """
    (rows, cols), (i, o) = w.shape, as_pair(block)
    mask = top_mask(score("magnitude", jax.lax.stop_gradient(w), block=block), density)
    mask = jnp.repeat(jnp.repeat(mask, i, 0), o, 1)[:rows, :cols]
    pruned = jnp.where(mask, w, 0)
    return w + jax.lax.stop_gradient(pruned - w) if straight_through else pruned


# ---- densities over layers -----------------------------------------------------------------------


def uniform(shapes: Any, density: float) -> Any:
    """The same density for every layer."""
    count_kept(density, 1)  # refuses what is no density
    return _map_shapes(lambda sizes: [density] * len(sizes), shapes)


def erk(shapes: Any, density: float) -> Any:
    """Erdős-Rényi-kernel densities: small layers are kept denser, and `density` holds over all of them together.

        density of a layer = min(1, e * sum(shape) / prod(shape)),  with the e for which the totals agree

    Args:
      shapes: any pytree of shapes (tuples): of linear layers (in, out), of convolutions (h, w, in, out).
      density: the fraction of all weights that is kept.
    Returns:
      the same pytree with a density for each shape.
    Source: Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134; for linear layers Mocanu et al. 2018.
    """

    def densities(shapes):
        sizes, raw = [math.prod(s) for s in shapes], [sum(s) / math.prod(s) for s in shapes]
        left, full = density * sum(sizes), set()
        while len(full) < len(sizes):  # a layer that would be more than dense is dense; the others share the rest
            rest = [k for k in range(len(sizes)) if k not in full]
            e = (left - sum(sizes[k] for k in full)) / sum(raw[k] * sizes[k] for k in rest)
            over = {k for k in rest if e * raw[k] > 1}
            if not over:
                return [1.0 if k in full else e * raw[k] for k in range(len(sizes))]
            full |= over
        return [1.0] * len(sizes)

    count_kept(density, 1)  # refuses what is no density
    return _map_shapes(densities, shapes)


def budget(shapes: Any, parameters: int, distribution: Callable[[Any, float], Any] = erk) -> Any:
    """Densities for which the layers together keep `parameters` weights, distributed by `erk` or `uniform`.

    Raises:
      ValueError: if the layers have fewer weights than that.
    """
    total = sum(math.prod(shape) for shape in jax.tree.leaves(shapes, is_leaf=_is_shape))
    if not 0 <= parameters <= total:
        raise ValueError(f"a budget of {parameters} parameters is outside 0 to {total}, which the dense layers have.")
    return distribution(shapes, parameters / total)


# ---- schedules -------------------------------------------------------------------------------------


def one_shot(density: float, step: int) -> Schedule:
    """Density 1 before `step`, `density` from then on."""
    return polynomial(1.0, density, step - 1, step)


def polynomial(start_density: float, end_density: float, start_step: int, end_step: int, power: float = 3) -> Schedule:
    """A density that falls fast at first and slowly at the end.

        density(t) = end + (start - end) * (1 - (t - start_step) / (end_step - start_step)) ** power

    held at its ends before and after. The step may be traced.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, where power is 3.
    """
    if end_step <= start_step:
        raise ValueError(f"end_step={end_step} must come after start_step={start_step}.")

    def density(step):
        left = 1 - jnp.clip((step - start_step) / (end_step - start_step), 0, 1)
        return end_density + (start_density - end_density) * left**power

    return density


def cyclic(
    start_density: float, end_density: float, start_step: int, end_step: int, cycles: int, power: float = 3
) -> Schedule:
    """`polynomial` in equal cycles, each from `start_density` again, so that what was pruned may return.

    The density stays at `end_density` from `end_step` on.

    Source: Srinivas et al. 2022, "Cyclical Pruning for Sparse Neural Networks", arXiv:2202.01290.
    """
    if cycles < 1:
        raise ValueError(f"cycles={cycles} must be at least 1.")
    period = (end_step - start_step) / cycles
    one = polynomial(start_density, end_density, 0, 1, power)

    def density(step):
        cycle = jnp.floor((step - start_step) / period)
        inside = jnp.maximum((step - start_step) / period, 0) - jnp.maximum(cycle, 0)
        return jnp.where(step >= end_step, end_density, one(inside))

    return density


# ---- masks on dense weights ------------------------------------------------------------------------


def prune_updates(masks: Any = None) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation, last in a chain, after which pruned weights are exactly zero.

        update -> update where the mask is set, else -weight

    Args:
      masks: a pytree like the parameters, with a mask that broadcasts against each, or None for what is not pruned.
        Where masks move, leave it out and hand them to every update: `optimizer.update(grads, state, params,
        masks=masks)`; `optax.chain` passes them through.
    Raises:
      ValueError: by `update`, without parameters or without masks.
    """

    def update(updates, state, params=None, **extra):
        current = extra.get("masks", masks)
        if params is None or current is None:
            missing = "params" if params is None else "masks"
            raise ValueError(f"prune_updates needs {missing}: optimizer.update(grads, state, params, masks=masks).")

        def bend(mask, update, weight):
            return update if mask is None else jnp.where(mask, update, -weight.astype(update.dtype))

        return jax.tree.map(bend, current, updates, params, is_leaf=lambda mask: mask is None), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# ---- what the above share --------------------------------------------------------------------------


def _is_shape(node) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _map_shapes(densities: Callable[[list], list], shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes, is_leaf=_is_shape)
    return jax.tree.unflatten(tree, densities(leaves))


def _check_shape(name: str, array, shape: tuple[int, ...]) -> None:
    if jnp.shape(array) != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {jnp.shape(array)}.")
