"""The rows of `summary` for models in Flax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse._sizes import is_unstructured
from jaxsparse.formats import PATTERNS, BlockPattern
from jaxsparse.linen import BlockDiagDense
from jaxsparse.models.summary import Call, Product, Row, largest, of_unknown_kind
from jaxsparse.nnx import BlockDiagLinear, Pattern

_LINEAR = (nnx.Linear, nnx.LinearGeneral)
_IN_LINEN = {"Dense": "linear", "DenseGeneral": "linear", "Embed": "table", BlockDiagDense.__name__: "diagonal"}
_IN_LINEN |= {"Conv": "convolution", "ConvTranspose": "transposed"}


def nnx_rows(model: nnx.Module, inputs: Sequence[Any]) -> Iterator[Row]:
    """Each module that has parameters of its own, where it is met first."""
    calls = _nnx_calls(model, inputs) if inputs else None
    counted: set[int] = set()
    for path, module in nnx.iter_modules(model):
        own = {name: v for name, v in vars(module).items() if isinstance(v, (nnx.Param, Pattern))}
        own = {name: v for name, v in own.items() if id(v) not in counted}
        counted |= {id(v) for v in own.values()}
        params = {name: v for name, v in own.items() if isinstance(v, nnx.Param)}
        if params:
            patterns = [v.get_value() for v in own.values() if isinstance(v, Pattern)]
            met = None if calls is None else calls.get(path, ())
            out = _number(getattr(module, "out_features", 1))
            yield _row(".".join(map(str, path)), type(module).__name__, params, patterns, _kind_of(module), out, met)


def _nnx_calls(model: nnx.Module, inputs: Sequence[Any]) -> Mapping[tuple, list[Call]]:
    """The calls of each layer, by its path: those of a twin whose layers tell, on shapes."""
    found: dict[tuple, list[Call]] = {}

    def telling(kind: type, path: tuple) -> type:
        def call(self, *args, **options):
            y = kind.__call__(self, *args, **options)
            _note(found, path, args, y, getattr(self, "kernel", None))
            return y

        return type(kind.__name__, (kind,), {"__call__": call})

    twin = nnx.merge(*nnx.split(model))
    for path, module in nnx.iter_modules(twin):
        if callable(module):
            module.__class__ = telling(type(module), path)
    nnx.eval_shape(lambda twin, *inputs: twin(*inputs), twin, *inputs)
    return found


def _number(features: int | Sequence[int]) -> int:
    """Of a layer's features, along all axes that it makes."""
    return math.prod(features) if isinstance(features, Sequence) else features


def _note(found: dict[tuple, list[Call]], path: tuple, args: tuple, y: Any, kernel: Any) -> None:
    if args and hasattr(args[0], "shape") and hasattr(y, "shape"):
        weight = 0 if kernel is None else math.prod(kernel.shape)
        found.setdefault(path, []).append(Call(math.prod(args[0].shape), math.prod(y.shape), weight))


def _kind_of(module: Any) -> str:
    if isinstance(module, BlockDiagLinear):
        return "diagonal"
    if isinstance(module, nnx.Embed):
        return "table"
    if isinstance(module, (nnx.Conv, nnx.ConvTranspose)):
        return "convolution" if isinstance(module, nnx.Conv) else "transposed"
    return "linear" if isinstance(module, _LINEAR) else "other"


def linen_rows(model: nn.Module, variables: Mapping[str, Any], inputs: tuple) -> Iterator[Row]:
    """Each node of the parameters that has arrays of its own."""
    variables = nn.unbox(variables)
    met, calls = _linen_calls(model, variables, inputs) if inputs else ({}, None)
    for path, node in _nodes(variables.get("params", {})):
        params = {name: leaf for name, leaf in node.items() if hasattr(leaf, "shape")}
        if not params:
            continue
        beside = _at(variables.get("pattern", {}), path)
        patterns = [leaf for leaf in beside.values() if isinstance(leaf, PATTERNS)]
        name, out = met.get(path) or (_guess({k: jnp.shape(a) for k, a in params.items()}, patterns), 1)
        made = None if calls is None else calls.get(path, ())
        yield _row(".".join(path), name, params, patterns, _IN_LINEN.get(name, "other"), out, made)


def _linen_calls(model: nn.Module, variables: Mapping[str, Any], inputs: tuple) -> tuple[dict, dict]:
    """Class and number of output features of every module that a call meets, and its calls, by its path."""
    found: dict[tuple, tuple[str, int]] = {}
    calls: dict[tuple, list[Call]] = {}

    def look(call, args, kwargs, context):
        module, y = context.module, call(*args, **kwargs)
        found.setdefault(module.path, (type(module).__name__, _number(getattr(module, "features", 1))))
        if context.method_name == "__call__":
            _note(calls, module.path, args, y, nn.unbox(module.variables).get("params", {}).get("kernel"))
        return y

    def apply(variables, *inputs):
        return model.apply(variables, *inputs, mutable=True, rngs={"dropout": jax.random.key(0)})

    with nn.intercept_methods(look):
        jax.eval_shape(apply, variables, *inputs)
    return found, calls


def _guess(shapes: Mapping[str, tuple[int, ...]], patterns: Sequence[Any]) -> str:
    """What a layer is, by the parameters that it has."""
    kernel = shapes.get("kernel", ())
    if patterns:
        return "SparseDense" if is_unstructured(_block_of(patterns[0])) else "BlockSparseDense"
    if len(kernel) == 2:
        return "Dense"
    if len(kernel) == 3 and kernel[0] > 1 and shapes.get("bias") == (kernel[0] * kernel[2],):
        return BlockDiagDense.__name__  # a convolution's bias has kernel[2] numbers
    return "Embed" if set(shapes) == {"embedding"} else "norm" if "scale" in shapes else "unknown"


def _nodes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, tree
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _nodes(child, (*path, name))


def _at(tree: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _row(
    path: str,
    name: str,
    params: Mapping[str, Any],
    patterns: Sequence[Any],
    kind: str,
    out: int,
    calls: Sequence[Call] | None,
) -> Row:
    """`kind` is how it multiplies; `out` is the number of its output features, of convolutions and linear layers."""
    shapes = {key: tuple(jnp.shape(a)) for key, a in params.items()}
    size = sum(map(math.prod, shapes.values()))
    count = sum(_nbytes(a) for a in [*params.values(), *jax.tree.leaves(patterns)])
    kernel = shapes.get("kernel", ())
    shape, block, density = kernel or largest(shapes), None, 1.0
    if patterns:
        p = patterns[0]
        shape, block, density, out = p.shape, _block_of(p), p.density, p.shape[1]
    elif kind == "diagonal":
        n, i, o = kernel[-3:]
        shape, block, density, out = (n * i, n * o), (i, o), 1 / n, n * o
    product = _product("linear" if patterns else kind, shapes, out)
    flops = None if product is None else product.made_in(calls)
    return Row(path, name, shape, block, density, size, count, flops)


def _product(kind: str, shapes: Mapping[str, tuple[int, ...]], out: int) -> Product | None:
    """What a layer multiplies; `out` is the number of its output features."""
    numbers = math.prod(shapes.get("kernel", ()))
    if kind in ("linear", "diagonal"):
        return Product(2 * numbers, out, weight=numbers)
    if kind == "convolution":
        return Product(2 * numbers, out, by_row=False, weight=numbers)
    if kind == "transposed":  # its kernel is (.., in, out)
        return Product(2 * numbers, shapes["kernel"][-2], of_input=True, by_row=False, weight=numbers)
    return Product(0) if kind == "table" else of_unknown_kind(shapes)


def _block_of(pattern: Any) -> tuple[int, int]:
    return pattern.block if isinstance(pattern, BlockPattern) else (1, 1)


def _nbytes(a: Any) -> int:
    return math.prod(jnp.shape(a)) * jnp.dtype(a.dtype).itemsize
