"""Sparse layers for PyTorch, and JAX functions and Flax models that torch calls and trains.

The products of the layers on CPU tensors are computed without JAX, which is imported when something first needs it.

Every call that goes through JAX waits for its result. On a CPU, where JAX hands computations to a thread of its own,
small ones are faster without that: `jax.config.update("jax_cpu_enable_async_dispatch", False)`, before JAX is first
used (`benchmarks/bridge.py` measures both).
"""

import importlib
from typing import TYPE_CHECKING

from torch_bridge import torch_ops as torch_ops  # registers torch.ops.jaxsparse

if TYPE_CHECKING:
    from torch_bridge._errors import BridgeError
    from torch_bridge.dlpack import jax_to_torch, torch_to_jax
    from torch_bridge.function import jax2torch
    from torch_bridge.module import FlaxModule, from_flax
    from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear
    from torch_bridge.patch import BlockSparseModelPatcher, densify, sparsify
    from torch_bridge.roles import parameter_groups

__all__ = [
    "BlockDiagLinear",
    "BlockSparseLinear",
    "BlockSparseModelPatcher",
    "BridgeError",
    "FlaxModule",
    "SparseLinear",
    "densify",
    "from_flax",
    "jax2torch",
    "jax_to_torch",
    "parameter_groups",
    "sparsify",
    "torch_to_jax",
]

# Resolved at first use: the layers need no JAX, and what needs JAX no Flax.
_HOMES = {
    "BridgeError": "_errors",
    **dict.fromkeys(("jax_to_torch", "torch_to_jax"), "dlpack"),
    "jax2torch": "function",
    **dict.fromkeys(("FlaxModule", "from_flax"), "module"),
    **dict.fromkeys(("BlockDiagLinear", "BlockSparseLinear", "SparseLinear"), "nn"),
    **dict.fromkeys(("BlockSparseModelPatcher", "densify", "sparsify"), "patch"),
    "parameter_groups": "roles",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"torch_bridge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'torch_bridge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
