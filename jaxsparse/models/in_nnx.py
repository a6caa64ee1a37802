"""Dense layers of an NNX model replaced by sparse ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxsparse._norms import relative_error
from jaxsparse.costs.racing import Races
from jaxsparse.models import _kept, _races
from jaxsparse.models._layers import dotted, nbytes, nnx_layer, why_left
from jaxsparse.models.report import Report, Row
from jaxsparse.models.rules import Rules, check_drawn, decide, parse, passed_over


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
            layer = nnx_layer(old, rule, rescale, rngs if fresh else None)
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
        sizes = {name: (size(old), size(layer)) for name, size in (("parameters", _size), ("bytes", _module_nbytes))}
        shape = (old.in_features, old.out_features)
        rows.append(Row.of(path, rule, shape, **sizes, relative_error=error, race=race))
        if rule:
            new[path] = layer
    report = Report(rows, _size(model), passed_over(parsed, left))
    if dry_run:
        return model, report
    put = lambda path, node: new.get(dotted(path), node) if isinstance(node, nnx.Module) else node  # noqa: E731
    return nnx.recursive_map(put, nnx.clone(model)), report


def _nnx_layers(model: nnx.Module) -> tuple[dict[str, nnx.Linear], dict[str, str], dict[str, str]]:
    """By path: the layers that can be replaced, why others that look dense can not, and the type names of the rest."""
    layers, left, others = {}, {}, {}
    for keys, m in nnx.iter_modules(model):
        path = dotted(keys)
        if type(m) is nnx.Linear:
            layers[path] = m
        elif isinstance(m, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)):
            left[path] = why_left(m, "nnx.Linear")
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


def _density(layer: Any) -> float:
    return layer.pattern.get_value().density if hasattr(layer, "pattern") else 1 / layer.num_blocks


def _relative_error(kernel: jax.Array, layer: Any) -> float:
    if isinstance(layer, nnx.Linear):
        return 0.0
    pattern = layer.pattern.get_value() if hasattr(layer, "pattern") else None
    return relative_error(kernel, _kept.densify(layer.kernel[...], pattern))


def _size(module: nnx.Module) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _module_nbytes(module: nnx.Module) -> int:
    return nbytes(nnx.state(module))
