"""PyTorch on top of JAX: functions, Flax models and sparse layers that torch calls and trains."""

from torch_bridge.autograd import jax2torch
from torch_bridge.dlpack import BridgeError, jax_to_torch, torch_to_jax
from torch_bridge.module import FlaxModule, from_flax
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear
from torch_bridge.patch import BlockSparseModelPatcher, sparsify

__all__ = [
    "BlockDiagLinear",
    "BlockSparseLinear",
    "BlockSparseModelPatcher",
    "BridgeError",
    "FlaxModule",
    "SparseLinear",
    "from_flax",
    "jax2torch",
    "jax_to_torch",
    "sparsify",
    "torch_to_jax",
]
