"""Which parameters of a torch model weight decay acts on: by what they are, not by how many dimensions they have."""

from __future__ import annotations

from typing import Any

from torch import nn

from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear

_NEVER = ("bias", "scale")  # those of `from_flax` too


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters for a torch optimizer: those that `weight_decay` acts on, and the others with 0.

    The usual rule, two dimensions or more, leaves out the weight [nnz] of a `SparseLinear`. Here the weight of every
    sparse layer decays, whatever its rank, under parametrizations and pruning too; so does what `from_flax` calls
    "kernel". Biases and the scales of norms do not. Any other parameter decays if it has two dimensions or more.

    Args:
      model: any module. Frozen parameters are left out, and shared ones stand in one group, once.
      weight_decay: of the first group.
    Raises:
      ValueError: if nothing in the model is trainable.
    """
    values = {id(p) for layer in model.modules() for p in _values(layer)}
    groups: tuple[list, list] = ([], [])
    for path, p in model.named_parameters():
        if p.requires_grad:
            name = path.rpartition(".")[2]
            decays = id(p) in values or (name not in _NEVER and (name == "kernel" or p.ndim >= 2))
            groups[not decays].append(p)
    if not any(groups):
        raise ValueError("the model has no trainable parameter: call this before freezing it, or unfreeze some.")
    return [{"params": group, "weight_decay": rate} for group, rate in zip(groups, (weight_decay, 0.0), strict=True)]


def _values(layer: nn.Module) -> list[nn.Parameter]:
    """What the weight of a sparse layer is, or is computed from."""
    if not isinstance(layer, (BlockDiagLinear, BlockSparseLinear, SparseLinear)):
        return []
    shape = layer.weight.shape
    return [p for path, p in layer.named_parameters() if "bias" not in path.split(".") and p.shape == shape]
