"""`jaxsparse.checkpoint` for torch: the same files, with tensors in place of arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxsparse import checkpoint
from jaxsparse.checkpoint import targets, trees


def save(path: str | os.PathLike, tree: Any) -> None:
    """Writes any tree of tensors, arrays and `BlockPattern`s, as `jaxsparse.checkpoint.save` does.

    A module's or an optimizer's `state_dict()` is such a tree. Tensors are dense; of a strided one the entries are
    saved, and not what else lies in its memory.

    Raises:
      ValueError: as `jaxsparse.checkpoint.save`.
    """
    arrays: trees.Arrays = {}
    node = trees.take_apart(tree, arrays, lambda leaf: _to_numpy(leaf) if isinstance(leaf, Tensor) else leaf)
    checkpoint.write(path, node, arrays)


def load(path: str | os.PathLike, target: Any = None) -> Any:
    """Reads what either `save` wrote, so that `load_state_dict(load(path))` takes it.

    Args:
      target: as for `jaxsparse.checkpoint.load`; the leaves are tensors on the devices of its tensors, and arrays where
        it has arrays. None gives dicts, lists and tuples of tensors on the CPU, and of `BlockPattern`s.
    Raises:
      ValueError: as `jaxsparse.checkpoint.load`.
    """
    if target is None:
        return checkpoint.read(path, _to_torch)
    return targets.fill(target, checkpoint.read(path, lambda a: a), _place)


def _place(a: Any, like: Any) -> Any:
    if not isinstance(like, Tensor):
        return targets.place(a, like)
    return _to_torch(a) if like.is_meta else _to_torch(a).to(like.device)


# torch and NumPy share no bfloat16 and no float8; bytes they share.
def _to_numpy(t: Tensor) -> np.ndarray:
    if t.layout != torch.strided or t.is_quantized:
        raise TypeError(f"it is no plain dense tensor, but {'quantized' if t.is_quantized else t.layout}.")
    t = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
    name = str(t.dtype).removeprefix("torch.")
    return t.reshape(-1).view(torch.uint8).numpy().view(np.dtype(name)).reshape(tuple(t.shape))


def _to_torch(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a.reshape(-1).view(np.uint8)).view(getattr(torch, a.dtype.name)).reshape(a.shape)
