"""Dense layers of a Linen model replaced by sparse ones: the module, and the variables of a trained one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse import linen as sparse_linen
from jaxsparse._norms import relative_error
from jaxsparse.costs.racing import Race, Races
from jaxsparse.models import _kept, _races
from jaxsparse.models._layers import dotted, drawn, nbytes, nnx_layer, nnx_linear, why_left
from jaxsparse.models.report import Report, Row
from jaxsparse.models.rules import Rule, Rules, decide, first_match, parse, passed_over


def sparsify_linen(module: linen.Module, rules: Rules) -> SparsifiedLinen:
    """A Linen module whose `nn.Dense` layers are sparse where rules say so: its `init` makes the sparse variables.

        model = sparsify_linen(Transformer(), [(r".*\\.mlp\\..*", {"kind": "sparse", "density": 0.1})])
        variables = model.init(key, x)  # "params" under the same paths as before, and "pattern"

    Args:
      module: any Linen module that is called through `__call__`. Where it lifts (`nn.scan`, `nn.vmap`), give the
        collection "pattern" an axis.
      rules: as for `sparsify`. With "keep": "nonzero" the variables come from `sparsify_variables`, as only a trained
        model says how many numbers there are.
    Raises:
      ValueError: for bad rules, here; in `init`, for rules that match nothing, with the nearest names, or that keep
        what is not zero.
    """
    return SparsifiedLinen(_Apart(module), parse(rules))


@dataclasses.dataclass(frozen=True)
class _Apart:
    """Hides a module from Flax, which would make it a submodule with a name and random keys of its own."""

    module: linen.Module


class SparsifiedLinen(linen.Module):
    """What `sparsify_linen` returns. It is called as the dense model; `torch_bridge.from_flax` needs `train_kwarg`.

    Attributes:
      dense: holds the dense model. Its names, and the values that `init` draws for what stays dense, stay the same.
      rules: the parsed rules.
    """

    dense: _Apart
    rules: tuple[Rule, ...]

    def __call__(self, *args, **kwargs):
        assert self.scope is not None  # Flax calls only bound modules
        layers, left, others = {}, {}, {}
        inner = self.dense.module.clone(parent=self.scope.rewound(), name=None)
        with linen.intercept_methods(_interceptor(self.rules, len(self.path), layers, left, others)):
            out = inner(*args, **kwargs)
        if self.is_initializing():
            decide(self.rules, layers, others, left)
        return out


def sparsify_variables(
    model: SparsifiedLinen, variables: Mapping[str, Any], *args, rescale: bool = False, **kwargs
) -> tuple[dict[str, Any], Report]:
    """Variables of a trained dense Linen model as those of the sparse one, largest weights kept.

    Args:
      model: from `sparsify_linen`.
      variables: of the dense model.
      args, kwargs: an input for the model, which tells where its dense layers are; nothing is computed with it.
      rescale: multiply what is kept, so that every weight keeps its Frobenius norm.
    Returns:
      New variables with a collection "pattern", and the report.
    Raises:
      ValueError: for rules that match nothing, and layers that a rule's sizes don't fit.
    """
    layers, left, others = _met(model, *args, **kwargs)
    params: dict[tuple[str, ...], Any] = dict(flatten_dict(variables["params"]))  # pyright: ignore[reportArgumentType]
    patterns, rows = dict(flatten_dict(variables.get("pattern", {}))), []
    total = sum(jnp.size(p) for p in params.values())
    for path, rule in decide(model.rules, layers, others, left).items():
        scope = layers[path].scope
        kernel = params[*scope, "kernel"]
        bias = params.get((*scope, "bias"), np.zeros(0, kernel.dtype))
        try:
            values, pattern = _kept.convert(kernel, rule, rescale)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        rule = rule.found(pattern.density) if pattern is not None else rule
        params[*scope, "kernel"] = values
        if pattern is not None:
            patterns[*scope, "pattern"] = pattern
        sizes = {
            "parameters": (kernel.size + bias.size, values.size + bias.size),
            "bytes": (kernel.nbytes + bias.nbytes, values.nbytes + bias.nbytes + nbytes(pattern)),
        }
        error = relative_error(kernel, _kept.densify(values, pattern))
        rows.append(Row.of(path, rule, kernel.shape, None, **sizes, relative_error=error))
    new = {**variables, "params": unflatten_dict(params)}
    if patterns:
        new["pattern"] = unflatten_dict(patterns)
    return new, Report(rows, total, passed_over(model.rules, left))


def keep_faster(
    model: SparsifiedLinen, variables: Mapping[str, Any], batch: int, *args, **kwargs
) -> tuple[SparsifiedLinen, dict[str, Race]]:
    """`only_if_faster` for Linen: the model with only those layers sparse whose races show that this is faster.

        model, races = keep_faster(sparsify_linen(dense, rules), variables, 128, x)
        variables, report = sparsify_variables(model, variables, x)

    Args:
      model: from `sparsify_linen`.
      variables: of the dense model.
      batch: the number of input rows to measure with.
      args, kwargs: as for `sparsify_variables`.
    Returns:
      A model with the same rules and exceptions for the other layers before them, and by path the race of forward and
      backward pass of each layer: `faster` is None where that can't tell, and the layer stays dense.
    Raises:
      ValueError: as `sparsify_variables`.
    """
    layers, left, others = _met(model, *args, **kwargs)
    params: dict[tuple[str, ...], Any] = dict(flatten_dict(variables["params"]))  # pyright: ignore[reportArgumentType]
    races, found = Races(batch), {}
    for path, rule in decide(model.rules, layers, others, left).items():
        scope, dtype, precision = layers[path]
        kernel = params[*scope, "kernel"]
        try:
            if kernel.ndim != 2:
                _kept.convert(kernel, rule, rescale=False)  # says why not
            dense = nnx_linear(kernel, (*scope, "bias") in params, dtype, precision)
            found[path] = _races.race(races, rule, dense, nnx_layer(dense, rule, False, None))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    stay = tuple([Rule(re.escape(path)) for path, race in found.items() if not race.faster])
    used = {id(first_match((*stay, *model.rules), path)) for path in layers}
    return SparsifiedLinen(model.dense, tuple([r for r in (*stay, *model.rules) if id(r) in used])), found


def _met(model: SparsifiedLinen, *args, **kwargs) -> tuple[dict[str, _Met], dict[str, str], dict[str, str]]:
    """By path: the layers that can be replaced, why others that look dense can not, and the type names of the rest."""
    layers, left, others = {}, {}, {}
    with linen.intercept_methods(_interceptor((), 0, layers, left, others)):
        jax.eval_shape(lambda: model.dense.module.init(jax.random.key(0), *args, **kwargs))
    return layers, left, others


class _Met(NamedTuple):
    """A Dense that was met: where its parameters are, and what it computes in."""

    scope: tuple[str, ...]
    dtype: Any
    precision: Any


def _interceptor(
    rules: tuple[Rule, ...], depth: int, layers: dict[str, _Met], left: dict[str, str], others: dict[str, str]
):
    """Computes `nn.Dense` calls by sparse layers in the same scope where rules say so, and notes what it meets.

    Args:
      depth: how much of every module's path lies above the model.
      layers, left, others: filled, by dotted path, with what was met of each Dense, the reason why one that looks like
        it is left, and the type name of every other module.
    """

    def intercept(next_call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        path = dotted(module.path[depth:])
        if type(module) is not linen.Dense:
            if isinstance(module, (linen.Dense, linen.DenseGeneral, linen.Einsum)):
                left[path] = why_left(module, "nn.Dense")
            else:
                others[path] = type(module).__name__
            return next_call(*args, **kwargs)
        layers[path] = _Met(module.path[depth:], module.dtype, module.precision)
        rule = first_match(rules, path)
        if rule is None or rule.kind is None:
            return next_call(*args, **kwargs)
        try:
            return _linen_layer(module, rule)(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return intercept


def _linen_layer(dense: linen.Dense, rule: Rule) -> linen.Module:
    """The sparse layer in the scope of a Dense, rewound so that a Dense that is called twice shares its weight."""
    if dense.dot_general or dense.dot_general_cls or dense.promote_dtype is not linen.Dense.promote_dtype:
        raise ValueError("it has a dot_general or promote_dtype of its own, which no sparse layer has.")
    classes = {"block_diag": "BlockDiagDense", "block_sparse": "BlockSparseDense", "sparse": "SparseDense"}
    if rule.keep and dense.is_initializing():
        raise ValueError(
            "init has no weights of which to keep what is not zero: use sparsify_variables on trained ones."
        )
    names = ("features", "use_bias", "dtype", "param_dtype", "precision", "kernel_init", "bias_init")
    options = {name: getattr(dense, name) for name in names} | drawn(rule)
    assert dense.scope is not None  # Flax calls only bound modules
    return getattr(sparse_linen, classes[str(rule.kind)])(**options, parent=dense.scope.rewound())
