"""Dense layers of a Flax model replaced by sparse ones, picked by rules on their paths: NNX and Linen."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsparse import linen as sparse_linen
from jaxsparse import nnx as sparse_nnx
from jaxsparse.costs.racing import Race, Races
from jaxsparse.models import _kept, _races
from jaxsparse.models._densify import densify as densify
from jaxsparse.models._densify import densify_variables as densify_variables
from jaxsparse.models.rules import Report, Row, Rule, Rules, check_drawn, decide, first_match, parse, passed_over


def sparsify(
    model: nnx.Module,
    rules: Rules,
    *,
    rngs: nnx.Rngs | None = None,
    dry_run: bool = False,
    rescale: bool = False,
    fresh: bool = False,
    only_if_faster: bool = False,
    batch: int | None = None,
) -> tuple[nnx.Module, Report]:
    """A copy of an NNX model with sparse layers, which keep the largest weights, in the place of `nnx.Linear` ones.

        model, report = sparsify(model, [(r".*\\.mlp\\..*", {"kind": "block_sparse", "density": 0.5})])

    A rule is a regular expression and its options; the first one that matches a layer's whole dotted path decides.

    Args:
      model: stays as it is, and shares nothing with the copy. Layers of subclasses of Linear are left alone.
      rules: pairs (regular expression, options). Options are {"kind": "block_diag", "num_blocks": n}, {"kind":
        "block_sparse", "density": d, "block": 32} or {"kind": "sparse", "density": d}; None leaves a layer dense.
        Block-sparse and sparse layers keep the blocks, or entries, of largest norm, block-diagonal ones what lies on
        the diagonal, in the order of the features as it is; `convert.block_diagonalize` finds better ones. For weights
        that were pruned before, "keep": "nonzero" in the place of a density keeps what is not zero, bit for bit.
      rngs: for `fresh` layers; a conversion draws nothing.
      dry_run: report what would happen, and return the model itself.
      rescale: multiply what is kept, so that every weight keeps its Frobenius norm.
      fresh: draw pattern and weights anew, for models that were not trained yet.
      only_if_faster: replace a layer only where a race shows that its forward and backward pass takes less time than
        the dense one's; where the race can't tell, the layer stays.
      batch: for `only_if_faster`, the number of input rows to measure with.
    Returns:
      The new model, and the report, row by row (`path`, `relative_error`, ...), with what was `left` and the reasons.
    Raises:
      ValueError: for bad rules and rules that match nothing, with the nearest names; for layers that a rule's sizes
        don't fit, whose weight others share, or that hold what a sparse layer can't take over.
    """
    if fresh and rngs is None:
        raise ValueError("fresh layers draw their weights: give rngs=nnx.Rngs(seed).")
    races = Races(batch) if only_if_faster else None
    parsed = parse(rules)
    if fresh:
        check_drawn(parsed)
    layers, left, others = _nnx_layers(model)
    chosen = decide(parsed, layers, others, left)
    _check_unshared(model, {path: layers[path] for path in chosen})
    rows, new = [], {}
    for path, rule in chosen.items():
        old = layers[path]
        try:
            layer = _nnx_layer(old, rule, rescale, rngs if fresh else None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        rule = rule.found(_density(layer))
        if rule.why_whole:
            left[path] = rule.why_whole
            continue
        race = _races.race(races, rule, old, layer) if races else None
        if race and not race.faster:
            rule, layer = None, old
        error = None if fresh and rule else _relative_error(old.kernel[...], layer)
        sizes = {name: (size(old), size(layer)) for name, size in (("parameters", _size), ("bytes", _nbytes))}
        shape = (old.in_features, old.out_features)
        rows.append(Row.of(path, rule, shape, **sizes, relative_error=error, race=race))
        if rule:
            new[path] = layer
    report = Report(rows, _size(model), passed_over(parsed, left))
    if dry_run:
        return model, report
    put = lambda path, node: new.get(_dotted(path), node) if isinstance(node, nnx.Module) else node  # noqa: E731
    return nnx.recursive_map(put, nnx.clone(model)), report


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
            "bytes": (kernel.nbytes + bias.nbytes, values.nbytes + bias.nbytes + _tree_nbytes(pattern)),
        }
        error = _kept.distance(kernel, _kept.densify(values, pattern))
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
            dense = _nnx_linear(kernel, (*scope, "bias") in params, dtype, precision)
            found[path] = _races.race(races, rule, dense, _nnx_layer(dense, rule, False, None))
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


def _why_left(module: Any, dense: str) -> str:
    """Why a layer that looks dense is not replaced."""
    kind = type(module).__name__
    is_derived = isinstance(module, (nnx.Linear, linen.Dense))
    what = f"a subclass of {dense}, which may compute something else" if is_derived else f"and no {dense}"
    return f"is a {kind}, {what}. Use {dense} there, or the sparse layer itself."


# ---- NNX ----------------------------------------------------------------------------------------------


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _nnx_layers(model: nnx.Module) -> tuple[dict[str, nnx.Linear], dict[str, str], dict[str, str]]:
    """By path: the layers that can be replaced, why others that look dense can not, and the type names of the rest."""
    layers, left, others = {}, {}, {}
    for keys, m in nnx.iter_modules(model):
        path = _dotted(keys)
        if type(m) is nnx.Linear:
            layers[path] = m
        elif isinstance(m, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)):
            left[path] = _why_left(m, "nnx.Linear")
        else:
            others[path] = type(m).__name__
    return layers, left, others


def _check_unshared(model: nnx.Module, layers: Mapping[str, nnx.Linear]) -> None:
    modules = [m for _, m in nnx.iter_modules(model)]
    uses = Counter(id(v) for m in modules for v in vars(m).values() if isinstance(v, nnx.Variable))
    for path, layer in layers.items():
        for name in ("kernel", "bias"):
            if uses[id(getattr(layer, name))] > 1:
                raise ValueError(
                    f"{path} shares its {name} with another module, and replacing it would part them. Leave it dense "
                    f"with a rule ({path!r}, None) before the others, or give it a {name} of its own first."
                )


def _nnx_layer(old: nnx.Linear, rule: Rule, rescale: bool, rngs: nnx.Rngs | None) -> Any:
    """The layer that replaces a Linear: drawn from `rngs`, or with what the rule keeps of its kernel."""
    plain = inspect.signature(nnx.Linear.__init__).parameters
    for name in ("dot_general", "promote_dtype", "preferred_element_type"):
        if getattr(old, name) is not plain[name].default:
            raise ValueError(f"it has a {name} of its own, which no sparse layer has. Leave it dense with a rule.")
    names = ("use_bias", "dtype", "param_dtype", "precision")
    options = {name: getattr(old, name) for name in names} | {"rngs": rngs or nnx.Rngs(0)}
    shape = (old.in_features, old.out_features)
    if rngs is not None:
        return _nnx_class(rule)(*shape, **_drawn(rule), **options)
    values, pattern = _kept.convert(old.kernel[...], rule, rescale)
    place = {"num_blocks": rule.num_blocks} if pattern is None else {"pattern": pattern}
    layer = _nnx_class(rule)(*shape, **place, kernel_init=nnx.initializers.zeros_init(), **options)
    layer.kernel[...] = values
    if old.bias is not None:
        layer.bias[...] = old.bias[...]
    return layer


def _nnx_linear(kernel: jax.Array, use_bias: bool, dtype: Any, precision: Any) -> nnx.Linear:
    """The NNX layer that computes as a Dense of Linen does."""
    options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": kernel.dtype, "precision": precision}
    zeros = nnx.initializers.zeros_init()
    linear = nnx.Linear(*kernel.shape, kernel_init=zeros, rngs=nnx.Rngs(0), **options)
    linear.kernel[...] = kernel
    return linear


def _nnx_class(rule: Rule) -> Any:
    classes = {"block_diag": "BlockDiagLinear", "block_sparse": "BlockSparseLinear", "sparse": "SparseLinear"}
    return getattr(sparse_nnx, classes[str(rule.kind)])


def _drawn(rule: Rule) -> dict[str, Any]:
    """The arguments of a layer that draws its pattern itself."""
    if rule.kind == "block_diag":
        return {"num_blocks": rule.num_blocks}
    return {"density": 1.0 if rule.keep else rule.density} | (
        {"block": rule.block} if rule.kind == "block_sparse" else {}
    )


def _density(layer: Any) -> float:
    return layer.pattern.get_value().density if hasattr(layer, "pattern") else 1 / layer.num_blocks


def _relative_error(kernel: jax.Array, layer: Any) -> float:
    if isinstance(layer, nnx.Linear):
        return 0.0
    pattern = layer.pattern.get_value() if hasattr(layer, "pattern") else None
    return _kept.distance(kernel, _kept.densify(layer.kernel[...], pattern))


def _size(module: nnx.Module) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _nbytes(module: nnx.Module) -> int:
    return _tree_nbytes(nnx.state(module))


def _tree_nbytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


# ---- Linen --------------------------------------------------------------------------------------------


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
        path = _dotted(module.path[depth:])
        if type(module) is not linen.Dense:
            if isinstance(module, (linen.Dense, linen.DenseGeneral, linen.Einsum)):
                left[path] = _why_left(module, "nn.Dense")
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
    options = {name: getattr(dense, name) for name in names} | _drawn(rule)
    assert dense.scope is not None  # Flax calls only bound modules
    return getattr(sparse_linen, classes[str(rule.kind)])(**options, parent=dense.scope.rewound())
