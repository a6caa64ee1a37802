"""What happens to a sum before its one rounding."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def wide(dtype):
    """The dtype of sums: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def empty(m: int, out: int, bias, activation: str | None, dtype) -> jax.Array:
    """The result where nothing is stored, or the batch is empty: no kernel runs."""
    y = jnp.zeros((m, out), wide(dtype))
    return ACTIVATIONS[activation](y if bias is None else y + bias.astype(y.dtype)).astype(dtype)
