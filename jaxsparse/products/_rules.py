"""What all products share: how one is bound, differentiated, batched and lowered."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxsparse._backends import PLATFORMS, Workload
from jaxsparse.products import _shards


class Product(Primitive):
    """A primitive over arrays of one matrix.

    Attributes:
      shards: how its operands and results split over devices.
      kernel: for a platform and the product's parameters, the function of arrays that computes it there.
      flops: what it takes, from the shapes of its operands and of its results: two for a multiply-add.
    """

    def __init__(
        self,
        name: str,
        *,
        shards: _shards.Shards,
        shapes: Callable[..., Sequence[tuple[int, ...]]],
        kernel: Callable[..., Callable[..., Any]],
        flops: Callable[..., Any],
        several: bool = False,
    ):
        """Of operands' types, `shapes` tells those of the results; `several` says that there is a list of them."""
        super().__init__(name)
        self.multiple_results = several
        self.shards, self.shapes, self.kernel, self.flops = shards, shapes, kernel, flops
        self.def_abstract_eval(functools.partial(_types, self))
        self.def_impl(functools.partial(_run, self))
        for platform in PLATFORMS:
            mlir.register_lowering(self, functools.partial(_lower, self, platform), platform=platform)
        _shards.asks_for_devices(self)

    def __call__(self, *operands, **params):
        """Binds it to operands; None stands for one that is left out at the end."""
        operands = [a for a in operands if a is not None]
        return self.bind(*_shards.aligned(self, operands, params), **params)


# ---- evaluation -----------------------------------------------------------------------------------------


def _types(product: Product, *operands, **params):
    """The results' shapes in the dtype of the first operand, which all operands share, and where they lie."""
    shapes = product.shapes(*operands, **params)
    types = _shards.result_types(product, operands, shapes)
    return types if product.multiple_results else types[0]


def _run(product: Product, *operands, **params):
    return _program(product, tuple(params.items()))(*operands)


@functools.lru_cache(maxsize=4096)
def _program(product: Product, params: tuple[tuple[str, Hashable], ...]):
    """Outside jit, a product is one program."""
    return jax.jit(functools.partial(product.bind, **dict(params)))


def _lower(product: Product, platform: str, ctx, *operands, **params):
    function = product.kernel(platform, **params)

    def local(*a):
        with _shards.on_one_device(ctx):
            return function(*a) if product.multiple_results else [function(*a)]

    split, types = _shards.split(product, ctx, local)
    return mlir.lower_fun(split, multiple_results=True)(ctx.replace(avals_in=types), *operands)


# ---- derivatives ----------------------------------------------------------------------------------------


def is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def is_unknown(operand: Any) -> bool:
    """Whether a transposition is for this operand."""
    return ad.is_undefined_primal(operand)


def added(terms: Sequence[Any], like: Any):
    """The sum of tangents, or that there is none."""
    return functools.reduce(jnp.add, terms) if terms else no_change(like)


def no_change(of: Any) -> Any:
    """The tangent of what depends on nothing that changes."""
    return ad.Zero(jax.typeof(of))


def jvp_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The tangent of a product which is also `function` of its floating-point operands, made of other products."""

    def rule(primals, tangents, **params):
        active = [k for k, t in enumerate(tangents) if not is_zero(t)]

        def of_active(*values):
            operands = list(primals)
            for k, value in zip(active, values, strict=True):
                operands[k] = value
            return function(*operands, **params)

        return jax.jvp(of_active, [primals[k] for k in active], [tangents[k] for k in active])

    return rule


def linear_in_each(product: Product) -> Callable[..., Any]:
    """The tangent of a product of two, linear in each: its value with the change of one in its place, added up."""

    def rule(primals, tangents, **params):
        (a, b, *rest), (ta, tb) = primals, tangents[:2]
        value = product(*primals, **params)
        terms = [product(*pair, *rest, **params) for pair, t in (((ta, b), ta), ((a, tb), tb)) if not is_zero(t)]
        return value, added(terms, value)

    return rule


def sample_transposed(multiply: Callable[..., Any]) -> Callable[..., Any]:
    """The transposition of x^T dy where W is stored, linear in each.

    With the cotangent G as the values of such a matrix, x gets dy G^T and dy gets x G, by `multiply`.
    """

    def rule(g, x, dy, *index, **how):
        count = 2 + len(index)
        if is_zero(g):
            return returned(count)
        if is_unknown(x):
            return returned(count, {0: multiply(dy, g, *index, activation=None, transposed=True, **how)})
        return returned(count, {1: multiply(x, g, *index, activation=None, transposed=False, **how)})

    return rule


def returned(count: int, cotangents: Mapping[int, Any] | None = None) -> list[Any]:
    """What a transposition returns: cotangents by the number of the operand, None for all others."""
    return [(cotangents or {}).get(k) for k in range(count)]


# ---- batching -------------------------------------------------------------------------------------------


def batch_rows(product: Product, rows: Sequence[int]) -> None:
    """A new leading axis of the operands `rows` is one more of the batch; any other batch is a loop."""

    def rule(operands, dims, **params):
        mapped = [k for k, d in enumerate(dims) if d is not None]
        if mapped != list(rows):
            return loop(functools.partial(product, **params), operands, dims)
        moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True)]
        return product(*moved, **params), 0

    batching.primitive_batchers[product] = rule


def batch_as(product: Product, function: Callable[..., Any]) -> None:
    """Batched, a product is `function` of the same operands, batched."""

    def rule(operands, dims, **params):
        result = jax.vmap(functools.partial(function, **params), dims)(*operands)
        return result, [0] * len(result) if product.multiple_results else 0

    batching.primitive_batchers[product] = rule


def loop(function: Callable[..., Any], operands, dims):
    """One call after the other: kernels have no axis for several matrices."""
    mapped = {k: jnp.moveaxis(operands[k], d, 0) for k, d in enumerate(dims) if d is not None}

    def one(taken):
        return function(*(taken.get(k, a) for k, a in enumerate(operands)))

    result = jax.lax.map(one, mapped)
    return result, [0] * len(result) if isinstance(result, (list, tuple)) else 0


# ---- rows -----------------------------------------------------------------------------------------------


def rows(x: jax.Array) -> jax.Array:
    """All leading dimensions as one: kernels take matrices."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def workload(op: str, x: jax.Array, block: tuple[int, int], stored: int, size: int) -> Workload:
    """What a back end is chosen for: x has the rows, and of `size` entries of the matrix so many are stored."""
    return Workload(op, x.dtype.name, block, math.prod(x.shape[:-1]), stored / max(size, 1))


def multiply_adds(x: tuple[int, ...], stored: tuple[int, ...]) -> int:
    """The operations of every row of x, by its shape, with every stored number."""
    return 2 * math.prod(x[:-1]) * math.prod(stored)
