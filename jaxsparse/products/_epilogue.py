"""Bias and activation: fused into the product, and derived as what they mean apart from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsparse._xla import ACTIVATIONS, wide
from jaxsparse.products._rules import Product, added, is_zero, no_change
from jaxsparse.products._shards import spread


def activate(name: str, z: jax.Array) -> jax.Array:
    """The activation of z, computed wide and rounded once."""
    return ACTIVATIONS[name](z.astype(wide(z.dtype))).astype(z.dtype)


# y = f(z) of z = xW + b has the tangent f'(z) (dx W + x dW + db). The reverse pass keeps z alone: f' is computed again.
def finished(activation: str | None, z: jax.Array, terms: Sequence[Any], of_bias: Sequence[Any]):
    """(y, its tangent), of z, the terms of the product's tangent and, if there is a bias, its tangent."""
    sums = wide(z.dtype)
    # Widened, so that the gradient of the bias, the sum over all rows, is rounded once.
    bias = [spread(t.astype(sums), z).astype(z.dtype) for t in of_bias if not is_zero(t)]
    tangent = added([*terms, *bias], z)
    if activation is None:
        return z, tangent
    function = functools.partial(activate, activation)
    if is_zero(tangent):
        y = function(z)
        return y, no_change(y)
    return jax.jvp(jax.checkpoint(function, prevent_cse=False), (z,), (tangent,))


def bilinear_then_finished(product: Product, index: int) -> Callable[..., Any]:
    """The tangent of activation(x W + bias), of operands x, W, `index` arrays of where W is stored, and any bias."""

    def rule(primals, tangents, *, activation, **how):
        (x, w, *rest), (tx, tw) = primals, tangents[:2]
        z = product(*primals, activation=None, **how)
        pairs = ((tx, w), tx), ((x, tw), tw)
        terms = [product(*pair, *rest[:index], activation=None, **how) for pair, t in pairs if not is_zero(t)]
        return finished(activation, z, terms, tangents[2 + index :])

    return rule


def refuse_epilogue(activation: str | None, of_bias: Sequence[bool]) -> None:
    """Only the product itself can be transposed."""
    if activation is not None or any(of_bias):
        raise ValueError(
            f"a product with activation {activation!r} or as a function of its bias is not linear, so it has no "
            "transpose: leave them out, and apply them to its result."
        )
