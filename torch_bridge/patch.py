"""Dense layers of a PyTorch model replaced by sparse ones, picked by rules on their paths."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from jaxsparse.costs.racing import Race, Races
from jaxsparse.models.report import Report, Row
from jaxsparse.models.rules import Rule, Rules, check_drawn, decide, parse, passed_over
from torch_bridge import _linear
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear


def sparsify(
    model: nn.Module,
    rules: Rules,
    *,
    dry_run: bool = False,
    rescale: bool = False,
    fresh: bool = False,
    only_if_faster: bool = False,
    batch: int | None = None,
    also: Sequence[type[nn.Module]] = (),
) -> PatchReport:
    """Replaces the linear layers of a model, in place, by sparse ones that keep their largest weights.

        sparsify(model, [(r"encoder\\..*\\.dense", {"kind": "block_sparse", "density": 0.5, "block": 32})])

    A rule is a regular expression and its options; the first one that matches a layer's whole dotted path (as
    `model.named_modules()` has it) decides. The new layers have parameters of their own: make the optimizer
    afterwards. A fresh model patched by the same rules loads the state_dict of a patched one.

    Linear are layers of the class `torch.nn.Linear` itself and of transformers' `Conv1D`. Others that look like one
    are left as they are, and the report says why: those whose forward pass is their own, whose weight is computed, or
    whose owner reads it past them, as `torch.nn.MultiheadAttention` does.

    Args:
      model: what is changed.
      rules: pairs (regular expression, options). Options are {"kind": "block_diag", "num_blocks": n}, {"kind":
        "block_sparse", "density": d, "block": 32} or {"kind": "sparse", "density": d}; None leaves a layer dense.
        Block-sparse and sparse layers keep the blocks, or entries, of largest norm, block-diagonal ones what lies on
        the diagonal, in the order of the features as it is. For weights that were pruned before, "keep": "nonzero" in
        the place of a density keeps what is not zero, bit for bit; of layers that torch.nn.utils.prune still masks,
        what the mask keeps.
      dry_run: report what would happen, and change nothing.
      rescale: multiply what is kept, so that every weight keeps its Frobenius norm.
      fresh: draw pattern and weights anew, from torch's generator, for models that were not trained yet.
      only_if_faster: replace a layer only where a race shows that its forward and backward pass takes less time than
        the dense one's; where the race can't tell, the layer stays.
      batch: for `only_if_faster`, the number of input rows to measure with.
      also: subclasses of `torch.nn.Linear` that compute just what it does, and whose layers are to be replaced too.
    Returns:
      The report, row by row (`path`, `relative_error`, ...), with what was `left` and the reasons; its `revert()` puts
      the old layers back.
    Raises:
      ValueError: for bad rules and rules that match nothing, with the nearest names; for layers that a rule's sizes
        don't fit, that have hooks, or whose weight other modules share. Nothing is changed then.
    """
    races = Races(batch) if only_if_faster else None
    parsed = parse(rules)
    if fresh:
        check_drawn(parsed)
    layers, left, others = _sort(model, also)
    chosen = decide(parsed, layers, others, left)
    _check_replaceable(model, {path: layers[path] for path in chosen})
    rows, new, size = [], {}, _size(model.parameters())
    for path, rule in chosen.items():
        old = layers[path]
        try:
            layer = _convert(old, rule, rescale, fresh)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        rule = rule.found(_density(layer))
        if rule.why_whole:
            left[path] = rule.why_whole
            continue
        race = _race(races, rule, old, layer) if races else None
        if race and not race.faster:
            rule, layer = None, old
        error = (
            None
            if fresh and layer is not old
            else _relative_error(old, layer, keeps_all=bool(rule and rule.keep) and not rescale)
        )
        rows.append(_row(path, rule, old, layer, relative_error=error, race=race))
        if rule:
            new[old] = layer
    undo = [] if dry_run else _replace(model, new)
    if not dry_run and "transformers.modeling_utils" in sys.modules:
        from torch_bridge import hugging_face  # where transformers was not imported, no model is of it

        hugging_face.mark(model)
    return PatchReport(rows, size, passed_over(parsed, left), undo)


def densify(model: nn.Module) -> nn.Module:
    """Puts `torch.nn.Linear` layers in the place of all sparse ones, in place, zeros stored as zeros.

    What results needs nothing of this library any more, in checkpoints and in exported programs. A layer with an
    activation becomes a `torch.nn.Sequential` of the Linear and that.

    Returns:
      The model, or what takes its place if it is a sparse layer itself.
    """
    sparse = [m for m in model.modules() if isinstance(m, (BlockDiagLinear, BlockSparseLinear))]
    new: dict[nn.Module, nn.Module] = {m: _dense(m) for m in sparse}
    _replace(model, new)
    return new.get(model, model)


def _dense(layer: Any) -> nn.Module:
    linear = layer.to_linear()
    if layer.activation is None:
        return linear
    return nn.Sequential(linear, _ACTIVATIONS[layer.activation]()).train(layer.training)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class PatchReport(Report):
    """What `sparsify` did. It holds the old layers, so that it can revert; drop it to free them."""

    def __init__(self, rows, parameters_before: int, left, undo: list[tuple[nn.Module, str, Any]]):
        super().__init__(rows, parameters_before, left)
        self._undo = undo

    def revert(self) -> None:
        """Puts the dense layers back, with the weights they had; what the sparse ones learned is gone.

        To stay with what they learned, use their `to_linear()`.
        """
        for module, name, value in self._undo:
            setattr(module, name, value)
        self._undo = []


class BlockSparseModelPatcher:
    """`sparsify` in the words of pytorch_block_sparse: patterns are added one by one, each with its density.

        patcher = BlockSparseModelPatcher()
        patcher.add_pattern(r"encoder\\..*\\.dense", {"density": 0.5})
        patcher.patch_model(model)

    Layers become `BlockSparseLinear` with blocks of 32, unless the options say otherwise; patterns must match the
    whole path, and they keep the blocks of largest norm.
    """

    def __init__(self):
        self.rules: list[tuple[str, Mapping[str, Any]]] = []

    def add_pattern(self, pattern: str, options: Mapping[str, Any]) -> None:
        """Adds a rule, after those that exist: a regular expression and {"density": d}, with "block" or "kind"."""
        rule = (pattern, {"kind": "block_sparse", **options})
        parse([rule])
        self.rules.append(rule)

    def get_patchable_layers(self, model: nn.Module) -> list[dict[str, Any]]:
        """One dict for each layer that can be replaced: "regexp", which matches it alone, and "layer"."""
        layers, _, _ = _sort(model, ())
        return [{"regexp": re.escape(path), "layer": m} for path, m in layers.items() if path]

    def patch_model(self, model: nn.Module, **options) -> PatchReport:
        """Replaces the layers that the patterns match, in place; options and report are those of `sparsify`."""
        return sparsify(model, self.rules, **options)


def _sort(
    model: nn.Module, also: Sequence[type[nn.Module]]
) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, str]]:
    """By path: the layers that can be replaced, why others that look like them can't, and the type names of the rest.

    Raises:
      ValueError: for a class in `also` that does not compute what torch.nn.Linear does.
    """
    for kind in also:
        if not issubclass(kind, nn.Linear) or kind.forward is not nn.Linear.forward:
            raise ValueError(f"also={kind.__name__} is no subclass of torch.nn.Linear with the forward pass of that.")
    read_past = {child for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    layers, left, others = {}, {}, {}
    for path, m in model.named_modules():
        reason = _THROUGH_ATTENTION if m in read_past else _why_left(m, also)
        if not _looks_dense(m):
            others[path] = type(m).__name__
        elif reason:
            left[path] = reason
        else:
            layers[path] = m
    return layers, left, others


_THROUGH_ATTENTION = "stays, as torch.nn.MultiheadAttention reads its weight and does not call it."


def _looks_dense(m: nn.Module) -> bool:
    weight = m._parameters.get("weight")
    is_matrix = weight is not None and not is_lazy(weight) and weight.ndim == 2
    return isinstance(m, nn.Linear) or (is_matrix and not isinstance(m, (nn.Embedding, nn.EmbeddingBag)))


def _why_left(m: nn.Module, also: Sequence[type[nn.Module]]) -> str | None:
    kind = type(m).__name__
    weight = m._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        return f"is a {kind} that has no weight yet: call the model once."
    if any(parametrize.is_parametrized(m, name) for name in ("weight", "bias")):
        return f"has a weight that a parametrization computes: {_linear.how_to_settle(m)} makes it a parameter."
    if _linear.why_not(m) is not None or type(m) is nn.Linear or type(m) in also or _linear.is_conv1d(m):
        return _linear.why_not(m)
    return f"is a {kind}, a subclass of torch.nn.Linear: where its owner only calls it, give also=({kind},)."


def _check_replaceable(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for a layer that has no parent, has hooks, or shares its weight or bias."""
    if "" in layers:
        raise ValueError("the model itself is the Linear: convert it with from_linear of the new layer's class.")
    owners = [(path, p) for path, m in model.named_modules() for p in m.parameters(recurse=False)]
    uses = Counter(id(p) for _, p in owners)
    for path, layer in layers.items():
        settle = _linear.how_to_settle(layer)
        pruning = _linear.pruning_hooks(layer)
        if settle and not pruning:
            raise ValueError(f"{path} has a weight that a hook computes. Make it a parameter first: {settle}.")
        hooks = [h for kind in ("forward", "forward_pre", "backward", "backward_pre") for h in _hooks(layer, kind)]
        if len(hooks) > len(pruning):
            raise ValueError(f"{path} has hooks, which its replacement would lose: register them after patching.")
        for name, p in layer.named_parameters():
            if uses[id(p)] > 1:
                other = next(owner for owner, q in owners if q is p and owner != path)
                raise ValueError(
                    f"{path} shares its {name} with {other}, and replacing it would part them. Leave it dense with "
                    f"a rule ({path!r}, None) before the others, or give it a {name} of its own first."
                )


def _hooks(layer: nn.Module, kind: str) -> list[Any]:
    return list(getattr(layer, f"_{kind}_hooks").values())


def _density(layer: Any) -> float:
    return 1 / layer.num_blocks if isinstance(layer, BlockDiagLinear) else layer.density


def _convert(linear: Any, rule: Rule, rescale: bool, fresh: bool) -> nn.Module:
    cls, options = {
        "block_diag": (BlockDiagLinear, {"num_blocks": rule.num_blocks}),
        "block_sparse": (BlockSparseLinear, {"density": rule.density, "block": rule.block}),
        "sparse": (SparseLinear, {"density": rule.density}),
    }[str(rule.kind)]
    if rule.keep:
        options["density"], options["mask"] = None, _linear.kept(linear)
    if not fresh:
        return cls.from_linear(linear, **options, rescale=rescale)
    dense = _linear.read(linear)
    return cls(*dense.shape, **options, **dense.options).train(linear.training)


def _row(path: str, rule: Rule | None, old: nn.Module, new: nn.Module, **numbers) -> Row:
    sizes = {"parameters": (_size(old.parameters()), _size(new.parameters())), "bytes": (_nbytes(old), _nbytes(new))}
    return Row.of(path, rule, _linear.read(old).shape, **sizes, **numbers)


def _relative_error(old: nn.Module, new: Any, keeps_all: bool) -> float:
    if new is old or keeps_all:  # what a mask of all that is not zero drops is zero
        return 0.0
    before, after = _linear.read(old).weight.value, new.to_linear().weight.detach().T
    lost, all_of_it = (float(torch.linalg.vector_norm(w, dtype=torch.float64)) for w in (after - before, before))
    return lost / all_of_it if all_of_it else 0.0


def _size(parameters) -> int:
    return sum(0 if is_lazy(p) else p.numel() for p in parameters)


def _nbytes(layer: nn.Module) -> int:
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


# In eval mode these read the weights of their Linear layers past the layers, unless an attribute says not to.
_SHORTCUTS: list[tuple[type[nn.Module], str, Any]] = [
    (nn.TransformerEncoder, "use_nested_tensor", False),
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
]


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Puts new layers wherever the old ones are, and returns (module, attribute, old value) of all that it set."""
    children = [(m, name, child) for m in model.modules() for name, child in m._modules.items() if child is not None]
    changes = [(m, name, new[child]) for m, name, child in children if child in new]
    for kind, name, value in _SHORTCUTS:
        around = [m for m in model.modules() if isinstance(m, kind) and any(child in new for child in m.modules())]
        changes += [(m, name, value) for m in around]
    undo = [(m, name, getattr(m, name)) for m, name, _ in changes]
    for m, name, value in changes:
        setattr(m, name, value)
    return undo


def _race(races: Races, rule: Rule, dense: nn.Module, sparse: nn.Module) -> Race:
    (w, trains), bias, _ = _linear.read(dense)

    def steps():
        x = torch.randn(races.batch, w.shape[0], dtype=w.dtype, device=w.device, requires_grad=True)
        return [_step(layer, x) for layer in (dense, sparse)]

    return races((w.shape, w.stride(), w.dtype, w.device, trains, bias is None, rule.describe()), steps)


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(layer(x).sum(), wanted)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return step
