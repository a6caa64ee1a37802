"""The rows of `summary` for models in Flax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxsparse.formats import BlockPattern
from jaxsparse.formats.n_m import NMPattern
from jaxsparse.linen import BlockDiagDense
from jaxsparse.models.summary import Row, dense_flops, largest
from jaxsparse.nnx import BlockDiagLinear, Pattern

_LINEAR = (nnx.Linear, nnx.LinearGeneral)
_LINEAR_IN_LINEN = ("Dense", "DenseGeneral")


def nnx_rows(model: nnx.Module) -> Iterator[Row]:
    """Each module that has parameters of its own, where it is met first."""
    counted: set[int] = set()
    for path, module in nnx.iter_modules(model):
        own = {name: v for name, v in vars(module).items() if isinstance(v, (nnx.Param, Pattern))}
        own = {name: v for name, v in own.items() if id(v) not in counted}
        counted |= {id(v) for v in own.values()}
        params = {name: v for name, v in own.items() if isinstance(v, nnx.Param)}
        if params:
            patterns = [v.get_value() for v in own.values() if isinstance(v, Pattern)]
            yield _row(".".join(map(str, path)), type(module).__name__, params, patterns, _kind_of(module))


def _kind_of(module: Any) -> str:
    if isinstance(module, BlockDiagLinear):
        return "diagonal"
    if isinstance(module, nnx.Embed):
        return "table"
    return "linear" if isinstance(module, _LINEAR) else "other"


def linen_rows(model: nn.Module, variables: Mapping[str, Any], inputs: tuple) -> Iterator[Row]:
    """Each node of the parameters that has arrays of its own."""
    variables = nn.unbox(variables)
    classes = _classes(model, variables, inputs) if inputs else {}
    for path, node in _nodes(variables.get("params", {})):
        params = {name: leaf for name, leaf in node.items() if hasattr(leaf, "shape")}
        if not params:
            continue
        beside = _at(variables.get("pattern", {}), path)
        patterns = [leaf for leaf in beside.values() if isinstance(leaf, (BlockPattern, NMPattern))]
        name = classes.get(path) or _guess({k: jnp.shape(a) for k, a in params.items()}, patterns)
        yield _row(".".join(path), name, params, patterns, _kind_in_linen(name))


def _classes(model: nn.Module, variables: Mapping[str, Any], inputs: tuple) -> dict[tuple[str, ...], str]:
    """The class of every module that a call meets, by its path; nothing is computed."""
    found = {}

    def look(call, args, kwargs, context):
        found.setdefault(context.module.path, type(context.module).__name__)
        return call(*args, **kwargs)

    def apply(variables, *inputs):
        return model.apply(variables, *inputs, mutable=True, rngs={"dropout": jax.random.key(0)})

    with nn.intercept_methods(look):
        jax.eval_shape(apply, variables, *inputs)
    return found


def _guess(shapes: Mapping[str, tuple[int, ...]], patterns: Sequence[Any]) -> str:
    """What a layer is, by the parameters that it has."""
    kernel = shapes.get("kernel", ())
    if patterns:
        return "SparseDense" if _block_of(patterns[0]) == (1, 1) else "BlockSparseDense"
    if len(kernel) == 2:
        return "Dense"
    if len(kernel) == 3 and kernel[0] > 1 and shapes.get("bias") == (kernel[0] * kernel[2],):
        return BlockDiagDense.__name__  # a convolution's bias has kernel[2] numbers
    return "Embed" if set(shapes) == {"embedding"} else "norm" if "scale" in shapes else "unknown"


def _kind_in_linen(name: str) -> str:
    if name == BlockDiagDense.__name__:
        return "diagonal"
    return "table" if name == "Embed" else "linear" if name in _LINEAR_IN_LINEN else "other"


def _nodes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, tree
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _nodes(child, (*path, name))


def _at(tree: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _row(path: str, name: str, params: Mapping[str, Any], patterns: Sequence[Any], kind: str) -> Row:
    shapes = {key: tuple(jnp.shape(a)) for key, a in params.items()}
    size = sum(map(math.prod, shapes.values()))
    count = sum(_nbytes(a) for a in [*params.values(), *jax.tree.leaves(patterns)])
    kernel = shapes.get("kernel", ())
    if patterns:
        p = patterns[0]
        return Row(path, name, p.shape, _block_of(p), p.density, size, count, 2 * math.prod(kernel))
    if kind == "diagonal":
        n, i, o = kernel[-3:]
        return Row(path, name, (n * i, n * o), (i, o), 1 / n, size, count, 2 * math.prod(kernel))
    if kind == "linear":
        return Row(path, name, kernel, None, 1.0, size, count, 2 * math.prod(kernel))
    return Row(path, name, largest(shapes), None, 1.0, size, count, 0 if kind == "table" else dense_flops(shapes))


def _block_of(pattern: Any) -> tuple[int, int]:
    return pattern.block if isinstance(pattern, BlockPattern) else (1, 1)


def _nbytes(a: Any) -> int:
    return math.prod(jnp.shape(a)) * jnp.dtype(a.dtype).itemsize
