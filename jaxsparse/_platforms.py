"""A function of arrays that each platform chooses when a program is lowered, and that is traced only then.

`jax.lax.platform_dependent` means the same, but traces the functions of all platforms for every call: most of a
first call would go into programs that nobody runs. So the choice is a primitive, which its lowering replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, partial_eval

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Choice(Protocol):
    """Platform to function; hashable, as it is a static parameter."""

    def __call__(self, platform: str, /) -> Callable[..., Any]: ...

    def keeping(self, used: tuple[bool, ...], /) -> Choice:
        """The same with only the used ones of its results: what is not asked for need not be computed."""
        ...

    def flops(self, operands: Any, results: Sequence[tuple[int, ...]], /) -> int:
        """What it takes, from the shapes of operands and results: two for a multiply-add."""
        ...


def by_platform(choice: Choice, *operands):
    """Calls `choice(platform)` on the operands (pytrees), which gives an array or a tuple of arrays.

    The functions of all platforms must agree in the shapes and dtypes of their results.
    """
    leaves, tree = jax.tree.flatten(operands)
    results = _choose.bind(*leaves, choice=_Flat(choice, tree))
    return results[0] if len(results) == 1 else tuple(results)


class _Flat(NamedTuple):
    choice: Choice
    tree: Any

    def __call__(self, platform: str):
        function = self.choice(platform)
        return lambda *leaves: jax.tree.leaves(function(*self.tree.unflatten(leaves)))

    def keeping(self, used):
        return self._replace(choice=self.choice.keeping(used))

    def flops(self, operands, results):
        return self.choice.flops(self.tree.unflatten(operands), results)


class _Vmapped(NamedTuple):
    choice: Choice
    axes: tuple[int | None, ...]

    def __call__(self, platform: str):
        return jax.vmap(self.choice(platform), self.axes)

    def keeping(self, used):
        return self._replace(choice=self.choice.keeping(used))

    def flops(self, operands, results):
        sizes = [shape[axis] for shape, axis in zip(operands, self.axes, strict=True) if axis is not None]
        one = [_without(axis, shape) for shape, axis in zip(operands, self.axes, strict=True)]
        return sizes[0] * self.choice.flops(one, [_without(0, shape) for shape in results])


def _without(axis: int | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


_choose = Primitive("choose_by_platform")
_choose.multiple_results = True


@_choose.def_impl
def _run(*leaves, choice):
    return choice(jax.default_backend())(*leaves)


# Inside `jax.shard_map` a result varies over every mesh axis that an operand varies over, as that of any product does:
# then a part of a sum is no replicated result, and `shard_map` refuses it as such. The functions themselves are traced
# on types without those axes. They compute on one device and know no mesh, and a kernel does not say what varies.
@_choose.def_abstract_eval
def _shapes(*leaves, choice):
    results = jax.make_jaxpr(choice(jax.default_backend()))(*_varying(leaves, frozenset())).out_avals
    axes = frozenset().union(*(leaf.manual_axis_type.varying for leaf in leaves))
    return _varying(jax.tree.leaves(results), axes)


def _varying(types: Sequence[Any], axes: frozenset) -> list[Any]:
    """The types as they vary over these mesh axes, and no others."""
    return [
        t if t.manual_axis_type.varying == axes else t.update(manual_axis_type=type(t.manual_axis_type)(varying=axes))
        for t in types
    ]


def _vmap(leaves, axes, *, choice):
    results = _choose.bind(*leaves, choice=_Vmapped(choice, tuple(axes)))
    return results, (0,) * len(results)


def _without_unused(used: Sequence[bool], *of_inputs_and_equation):
    equation = of_inputs_and_equation[-1]  # since JAX 0.12 which inputs are alive comes before it
    inputs = [any(used)] * len(equation.invars)
    if not any(used):
        return inputs, None
    if all(used):
        return inputs, equation
    outputs = [variable for variable, kept in zip(equation.outvars, used, strict=True) if kept]
    choice = equation.params["choice"].keeping(tuple(used))
    return inputs, equation.replace(outvars=outputs, params={"choice": choice})


def _lowered(platform, ctx, *leaves, choice):
    ctx = ctx.replace(avals_in=_varying(ctx.avals_in, frozenset()))
    return mlir.lower_fun(choice(platform), multiple_results=True)(ctx, *leaves)


batching.primitive_batchers[_choose] = _vmap
partial_eval.dce_rules[_choose] = _without_unused
for _platform in PLATFORMS:
    mlir.register_lowering(_choose, functools.partial(_lowered, _platform), platform=_platform)
