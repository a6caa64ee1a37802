"""`jaxsparse.checkpoint` for torch: the same files, with tensors in place of arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxsparse import checkpoint


def save(path: str | os.PathLike, tree: dict[str, Any]) -> None:
    """Writes a dict, or nested dicts, of tensors, arrays and `BlockPattern`s, as `jaxsparse.checkpoint.save` does."""
    checkpoint.save(path, _map(lambda a: _to_numpy(a) if isinstance(a, Tensor) else a, tree))


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what either `save` wrote: the same nested dicts, of tensors on the CPU and of `BlockPattern`s.

    Raises:
      ValueError: as `jaxsparse.checkpoint.load`.
    """
    return _map(lambda a: _to_torch(a) if isinstance(a, np.ndarray) else a, checkpoint.load(path))


def _map(f, tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _map(f, value) if isinstance(value, dict) else f(value) for key, value in tree.items()}


# torch and NumPy share no bfloat16 and no float8; bytes they share.
def _to_numpy(t: Tensor) -> np.ndarray:
    t = t.detach().cpu().contiguous()
    name = str(t.dtype).removeprefix("torch.")
    return t.reshape(-1).view(torch.uint8).numpy().view(np.dtype(name)).reshape(tuple(t.shape))


def _to_torch(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a.reshape(-1).view(np.uint8)).view(getattr(torch, a.dtype.name)).reshape(a.shape)
