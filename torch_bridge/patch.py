"""Dense layers of a PyTorch model replaced by sparse ones, picked by rules on their paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaxsparse._rules import Races, Report, Row, Rule, Rules, decide, parse
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
) -> PatchReport:
    """Replaces `torch.nn.Linear` layers of a model, in place, by sparse ones that keep their largest weights.

        sparsify(model, [(r"encoder\\..*\\.dense", {"kind": "block_sparse", "density": 0.5, "block": 32})])

    A rule is a regular expression and its options; the first one that matches a layer's whole dotted path (as
    `model.named_modules()` has it) decides. The new layers have parameters of their own: make the optimizer
    afterwards. A fresh model patched by the same rules loads the state_dict of a patched one.

    Args:
      model: what is changed; layers of subclasses of Linear, whose owners reach into them, are left alone.
      rules: pairs (regular expression, options). Options are {"kind": "block_diag", "num_blocks": n}, {"kind":
        "block_sparse", "density": d, "block": 32} or {"kind": "sparse", "density": d}; None leaves a layer dense.
        Block-sparse and sparse layers keep the blocks, or entries, of largest norm, block-diagonal ones what lies on
        the diagonal, in the order of the features as it is.
      dry_run: report what would happen, and change nothing.
      rescale: multiply what is kept, so that every weight keeps its Frobenius norm.
      fresh: draw pattern and weights anew, from torch's generator, for models that were not trained yet.
      only_if_faster: replace a layer only where its forward and backward pass takes less time than the dense one's.
      batch: for `only_if_faster`, the number of input rows to measure with.
    Returns:
      The report, row by row (`path`, `relative_error`, ...); its `revert()` puts the old layers back.
    Raises:
      ValueError: for bad rules and rules that match nothing, with the nearest names; for layers that a rule's sizes
        don't fit, that have hooks, or whose weight other modules share. Nothing is changed then.
    """
    races = Races(batch) if only_if_faster else None
    layers = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    others = {path: type(m).__name__ for path, m in model.named_modules() if path not in layers}
    chosen = decide(parse(rules), layers, others)
    _check_replaceable(model, {path: layers[path] for path in chosen})
    rows, new = [], {}
    for path, rule in chosen.items():
        old = layers[path]
        try:
            layer = _convert(old, rule, rescale, fresh)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        times = _race(races, rule, old, layer) if races else None
        if times and times[1] >= times[0]:
            rule, layer = None, old
        error = None if fresh and layer is not old else _relative_error(old, layer)
        rows.append(_row(path, rule, old, layer, relative_error=error, milliseconds=times))
        if rule:
            new[old] = layer
    return PatchReport(rows, _size(model.parameters()), [] if dry_run else _replace(model, new))


class PatchReport(Report):
    """What `sparsify` did. It holds the old layers, so that it can revert; drop it to free them."""

    def __init__(self, rows: Sequence[Row], parameters_before: int, undo: list[tuple[nn.Module, str, Any]]):
        super().__init__(rows, parameters_before)
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
        return [
            {"regexp": re.escape(path), "layer": m}
            for path, m in model.named_modules()
            if type(m) is nn.Linear and path
        ]

    def patch_model(self, model: nn.Module, **options) -> PatchReport:
        """Replaces the layers that the patterns match, in place; options and report are those of `sparsify`."""
        return sparsify(model, self.rules, **options)


def _check_replaceable(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raises ValueError for a layer that has no parent, has hooks, or shares its weight or bias."""
    if "" in layers:
        raise ValueError("the model itself is the Linear: convert it with from_linear of the new layer's class.")
    owners = [(path, p) for path, m in model.named_modules() for p in m.parameters(recurse=False)]
    uses = Counter(id(p) for _, p in owners)
    for path, layer in layers.items():
        if any(getattr(layer, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            raise ValueError(f"{path} has hooks, which its replacement would lose: register them after patching.")
        for name, p in layer.named_parameters():
            if uses[id(p)] > 1:
                other = next(owner for owner, q in owners if q is p and owner != path)
                raise ValueError(
                    f"{path} shares its {name} with {other}, and replacing it would part them. Leave it dense with "
                    f"a rule ({path!r}, None) before the others, or give it a {name} of its own first."
                )


def _convert(linear: nn.Linear, rule: Rule, rescale: bool, fresh: bool) -> nn.Module:
    cls, options = {
        "block_diag": (BlockDiagLinear, {"num_blocks": rule.num_blocks}),
        "block_sparse": (BlockSparseLinear, {"density": rule.density, "block": rule.block}),
        "sparse": (SparseLinear, {"density": rule.density}),
    }[str(rule.kind)]
    if not fresh:
        return cls.from_linear(linear, **options, rescale=rescale)
    options |= {"bias": linear.bias is not None, "device": linear.weight.device, "dtype": linear.weight.dtype}
    return cls(linear.in_features, linear.out_features, **options).train(linear.training)


def _row(path: str, rule: Rule | None, old: nn.Linear, new: nn.Module, **numbers) -> Row:
    sizes = {"parameters": (_size(old.parameters()), _size(new.parameters())), "bytes": (_nbytes(old), _nbytes(new))}
    return Row.of(path, rule, (old.in_features, old.out_features), **sizes, **numbers)


def _relative_error(old: nn.Linear, new: Any) -> float:
    if new is old:
        return 0.0
    lost, all_of_it = (
        float(torch.linalg.vector_norm(w.detach(), dtype=torch.float64))
        for w in (new.to_linear().weight - old.weight, old.weight)
    )
    return lost / all_of_it if all_of_it else 0.0


def _size(parameters) -> int:
    return sum(p.numel() for p in parameters)


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


def _race(races: Races, rule: Rule, dense: nn.Linear, sparse: nn.Module) -> tuple[float, float]:
    w = dense.weight

    def steps():
        x = torch.randn(races.batch, dense.in_features, dtype=w.dtype, device=w.device, requires_grad=True)
        return [_step(layer, x) for layer in (dense, sparse)]

    return races((w.shape, w.dtype, w.device, w.requires_grad, dense.bias is None, rule.describe()), steps)


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(layer(x).sum(), wanted)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return step
