"""`FlatOp`: a JAX function of flat arrays, compiled with its residuals and its pullback. Knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Mask = tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
    """What a flat function returns: array leaves, and the tree that they are the leaves of."""

    leaves: tuple
    tree: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the pullback needs beside the inputs, and how to run it."""

    leaves: tuple
    plan: Plan = dataclasses.field(metadata={"static": True})


class Plan:
    """How to rebuild one traced pullback from its residuals.

    A residual that is an argument of the forward function is not returned by it (jit would copy it): `inputs`
    lists, in order, the arguments that the caller has to bring again.
    """

    def __init__(self, tree: Any, route: tuple[int | None, ...]):
        self.inputs = tuple(i for i in route if i is not None)
        self.backward = jax.jit(self._backward)
        self._tree, self._route = tree, route

    def _backward(self, computed, inputs, cotangents):
        computed, inputs = iter(computed), iter(inputs)
        leaves = [next(computed) if i is None else next(inputs) for i in self._route]
        return _conjugate(jax.tree.unflatten(self._tree, leaves)(_conjugate(cotangents)))


class FlatOp:
    """`fn(*arrays) -> Out` and what is derived from it, each compiled once per mask and cached by shape.

    Attributes:
      fn: the function itself.
      name: for messages.
      describe: operand number -> its name, for messages.
      infer: `fn`, jitted. Always call it jitted: an output is then never an input or a constant.
      traces: how often the forward function with residuals was traced.
    """

    def __init__(self, fn: Callable[..., Out], name: str, describe: Callable[[int], str]):
        self.fn, self.name, self.describe = fn, name, describe
        self.infer = jax.jit(fn)
        self.traces = 0
        self._forward: dict[Mask, Callable[..., tuple[Out, Residuals]]] = {}
        self._vjp: dict[Mask, FlatOp] = {}

    def forward(self, mask: Mask) -> Callable[..., tuple[Out, Residuals]]:
        """The jitted function of all operands that also keeps what the gradients of those in `mask` need."""
        if mask not in self._forward:
            self._forward[mask] = jax.jit(lambda *xs: self._with_residuals(mask, xs))
        return self._forward[mask]

    def vjp(self, mask: Mask) -> FlatOp:
        """The gradients of the operands in `mask` as a function of all operands, then the cotangents of the
        inexact outputs. It starts from the operands again, and is itself a FlatOp: so is its own vjp."""
        if mask not in self._vjp:
            n = len(mask)

            def gradients(*xs):
                _, pullback, _ = self._pullback(mask, xs[:n])
                return Out(_conjugate(pullback(_conjugate(xs[n:]))), None)

            def describe(i):
                return self.describe(i) if i < n else f"gradient of output {i - n}"

            self._vjp[mask] = FlatOp(gradients, f"gradient of {self.name}", describe)
        return self._vjp[mask]

    def _pullback(self, mask: Mask, xs):
        """jax.vjp over the operands in `mask` and the inexact outputs."""

        def of_active(*active):
            active = iter(active)
            out = self.fn(*[next(active) if m else x for m, x in zip(mask, xs, strict=True)])
            return tuple(leaf for leaf in out.leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)), out

        return jax.vjp(of_active, *[x for x, m in zip(xs, mask, strict=True) if m], has_aux=True)

    def _with_residuals(self, mask: Mask, xs) -> tuple[Out, Residuals]:
        self.traces += 1
        _, pullback, out = self._pullback(mask, xs)
        leaves, tree = jax.tree.flatten(pullback)
        where = {id(x): i for i, x in enumerate(xs)}
        route = tuple(where.get(id(leaf)) for leaf in leaves)
        computed = tuple(leaf for leaf, i in zip(leaves, route, strict=True) if i is None)
        return out, Residuals(computed, Plan(tree, route))


# torch's gradient of a complex value is the conjugate of JAX's.
def _conjugate(xs) -> tuple:
    return tuple(x.conj() if jnp.issubdtype(x.dtype, jnp.complexfloating) else x for x in xs)
