"""What a rule keeps of one dense kernel, and how far that is from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsparse._arguments import features_per_block
from jaxsparse.formats import BlockPattern
from jaxsparse.models.rules import Rule


def convert(kernel: Float[Array, "in out"], rule: Rule, rescale: bool) -> tuple[jax.Array, BlockPattern | None]:
    """What a rule keeps of a dense kernel: (values, pattern), without a pattern for block-diagonal ones."""
    if kernel.ndim != 2:
        raise ValueError(
            f"its kernel has shape {kernel.shape}: layers that were stacked by vmap or scan are not converted. "
            "Make the sparse layers inside of the lifted module instead."
        )
    if rule.kind == "block_diag":
        pattern, values = None, _diagonal_blocks(kernel, rule.num_blocks or 1)
    else:
        if rule.keep:
            pattern = BlockPattern.from_mask(np.asarray(kernel) != 0, rule.block)
        else:
            pattern = BlockPattern.from_dense(kernel, density=rule.density or 0, block=rule.block)
        values = pattern.gather(kernel)
    if rescale:
        before, after = (float(np.linalg.norm(np.asarray(w, np.float64))) for w in (kernel, values))
        values = (values * (before / after if after else 1.0)).astype(kernel.dtype)
    return values, pattern


def _diagonal_blocks(kernel: Float[Array, "in out"], num_blocks: int) -> Float[Array, "n i o"]:
    i, o = (features_per_block(name, size, num_blocks) for name, size in zip(("in", "out"), kernel.shape, strict=True))
    n = jnp.arange(num_blocks)
    return kernel.reshape(num_blocks, i, num_blocks, o)[n, :, n]


def densify(values: jax.Array, pattern: BlockPattern | None) -> jax.Array:
    return jax.scipy.linalg.block_diag(*values) if pattern is None else pattern.to_dense(values)
