"""`FlatOp`: a JAX function of flat arrays, compiled with its residuals and its pullback. Knows no torch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

Mask = tuple[bool, ...]
_MANY_SHAPES = 16


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
      places: what `Views` calls the first operands; those of derivations that come after them are never kept.
      infer: `fn`, jitted. Always call it jitted: an output is then never an input or a constant.
      work: the program, for such operands, of what counts as its work.
      traces: how often the forward function with residuals was traced.
      shapes: those of the operands that something was compiled for.
    """

    def __init__(self, fn: Callable[..., Out], name: str, describe: Callable[[int], str], places: Sequence[str] = ()):
        self.fn, self.name, self.describe, self.places = fn, name, describe, places
        self.work: Callable[..., jax.extend.core.ClosedJaxpr] = jax.make_jaxpr(fn)
        self.infer = jax.jit(self._infer)
        self.traces = 0
        self.shapes: set[tuple] = set()
        self._forward: dict[Mask, Callable[..., tuple[Out, Residuals]]] = {}
        self._derived: dict[tuple[str, tuple], FlatOp] = {}

    def forward(self, mask: Mask) -> Callable[..., tuple[Out, Residuals]]:
        """The jitted function of all operands that also keeps what the gradients of those in `mask` need."""
        if mask not in self._forward:
            self._forward[mask] = jax.jit(lambda *xs: self._with_residuals(mask, xs))
        return self._forward[mask]

    # Each derivation is again a function of flat arrays, so they nest: gradients of gradients, vmaps of them.

    def vjp(self, mask: Mask) -> FlatOp:
        """The gradients of the operands in `mask` as a function of all operands, then the cotangents of the
        inexact outputs. It starts from the operands again."""
        n = len(mask)

        def gradients(*xs):
            _, pullback, _ = self._pullback(mask, xs[:n])
            return Out(_conjugate(pullback(_conjugate(xs[n:]))), None)

        def work(*avals):
            """The pullback alone: elsewhere it goes on from residuals."""
            programs = []

            def trace(*xs):
                _, pullback, _ = self._pullback(mask, xs[:n])
                programs.append(jax.make_jaxpr(pullback)(xs[n:]))

            jax.eval_shape(trace, *avals)
            return programs[0]

        derived = self._derive("gradient", mask, gradients, lambda i: f"gradient of output {i - n}")
        derived.work = work
        return derived

    def jvp(self, mask: Mask) -> FlatOp:
        """The tangents of the inexact outputs as a function of all operands, then the tangents of those in
        `mask`."""
        n = len(mask)

        def tangents(*xs):
            function, active = self._of_active(mask, xs[:n])
            return Out(jax.jvp(function, active, xs[n:], has_aux=True)[1], None)

        return self._derive("tangent", mask, tangents, lambda i: f"tangent {i - n}")

    def vmap(self, axes: tuple[int | None, ...]) -> FlatOp:
        """The function mapped over these axes of its operands; outputs are stacked along axis 0."""
        return self._derive("batch", axes, jax.vmap(self.fn, in_axes=axes), str)

    def _derive(self, kind: str, key: tuple, fn: Callable[..., Out], describe: Callable[[int], str]) -> FlatOp:
        if (kind, key) not in self._derived:
            own = range(len(key))
            name = f"{kind} of {self.name}"
            self._derived[kind, key] = FlatOp(
                fn, name, lambda i: self.describe(i) if i in own else describe(i), self.places
            )
        return self._derived[kind, key]

    def _of_active(self, mask: Mask, xs):
        """(the inexact outputs, all outputs) as a function of the operands in `mask`; and those."""

        def function(*active):
            active = iter(active)
            out = self.fn(*[next(active) if m else x for m, x in zip(mask, xs, strict=True)])
            return tuple(leaf for leaf in out.leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)), out

        return function, tuple(x for x, m in zip(xs, mask, strict=True) if m)

    def _pullback(self, mask: Mask, xs):
        function, active = self._of_active(mask, xs)
        return jax.vjp(function, *active, has_aux=True)

    def _infer(self, *xs) -> Out:
        self._note_shapes(xs)
        return self.fn(*xs)

    def _with_residuals(self, mask: Mask, xs) -> tuple[Out, Residuals]:
        self._note_shapes(xs)
        self.traces += 1
        _, pullback, out = self._pullback(mask, xs)
        leaves, tree = jax.tree.flatten(pullback)
        where = {id(x): i for i, x in enumerate(xs)}
        route = tuple(where.get(id(leaf)) for leaf in leaves)
        computed = tuple(leaf for leaf, i in zip(leaves, route, strict=True) if i is None)
        return out, Residuals(computed, Plan(tree, route))

    def _note_shapes(self, xs) -> None:
        """Warns, once, when shapes go on varying."""
        shapes = tuple(x.shape for x in xs)
        if shapes in self.shapes:
            return
        self.shapes.add(shapes)
        if len(self.shapes) == _MANY_SHAPES:
            warnings.warn(
                f"{self.name} has been compiled for {_MANY_SHAPES} different shapes, and will be for every new one. "
                "Pad inputs to a few sizes (a last, smaller batch: DataLoader(drop_last=True)), or let compiled code "
                "outlive the process: jax.config.update('jax_compilation_cache_dir', ...).",
                stacklevel=2,
            )


# torch's gradient of a complex value is the conjugate of JAX's.
def _conjugate(xs) -> tuple:
    return tuple(x.conj() if jnp.issubdtype(x.dtype, jnp.complexfloating) else x for x in xs)
