"""The arguments of layers, in Flax and in torch: checked without either, and without JAX until a pattern is given."""

from __future__ import annotations

from typing import Any


def features_per_block(name: str, features: int, num_blocks: int) -> int:
    """features / num_blocks, or a ValueError that does the arithmetic."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1.")
    size, rest = divmod(features, num_blocks)
    if rest or not size:
        near = min((n for n in range(1, features + 1) if features % n == 0), key=lambda n: abs(n - num_blocks))
        raise ValueError(
            f"{name}={features} is not a whole number of features for each of {num_blocks} blocks: "
            f"{features} = {size} x {num_blocks} + {rest}. "
            f"Pad {name} to {num_blocks * (size + 1)}, or use num_blocks={near}."
        )
    return size


def check_one(density, pattern, mask) -> str:
    """The name of the one that is given, or a ValueError."""
    given = [n for n, value in (("density", density), ("pattern", pattern), ("mask", mask)) if value is not None]
    if len(given) != 1:
        what = f"got {' and '.join(given)}" if given else "got none of them"
        raise ValueError(f"give exactly one of density, pattern and mask: {what}.")
    return given[0]


def refuse_empty(density: float, shape: tuple[int, int]) -> None:
    """Raises ValueError for the density of a layer that would store nothing."""
    if density == 0:
        raise ValueError(
            "density=0 leaves a layer without a weight. Give a density above 0, or where a layer is to be its bias "
            f"alone, an empty pattern: BlockPattern.random(key, {shape}, density=0)."
        )


def check_fits(pattern: Any, shape: tuple[int, int], name: str = "pattern", kinds: tuple[type, ...] = ()) -> None:
    """Raises ValueError unless it is a pattern, of these kinds or a BlockPattern, of an (in, out) matrix like this."""
    from jaxsparse.formats import BlockPattern

    kinds = kinds or (BlockPattern,)
    if not isinstance(pattern, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        remedy = (
            "Its to_pattern(values) gives the same matrix as single entries."
            if hasattr(pattern, "to_pattern")
            else "Of what Orbax restored without a target, jaxsparse.checkpoint.restore_patterns(variables) makes "
            "patterns again."
        )
        raise ValueError(f"the {name} is a {type(pattern).__name__}, not a {wanted}. {remedy}")
    if pattern.shape != shape:
        remedy = "Transpose it." if pattern.shape == shape[::-1] else f"Make one of shape {shape}."
        raise ValueError(
            f"the {name} is of a {pattern.shape} (in, out) matrix, but the layer maps {shape[0]} features "
            f"to {shape[1]}. {remedy}"
        )
