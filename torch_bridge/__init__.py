"""PyTorch on top of JAX: functions, Flax models and sparse layers that torch calls and trains.

Every call waits for its result. On a CPU, where JAX hands computations to a thread of its own, small ones are faster
without that: `jax.config.update("jax_cpu_enable_async_dispatch", False)`, before JAX is first used
(`benchmarks/bridge.py` measures both).
"""

from torch_bridge import torch_ops as torch_ops  # registers torch.ops.jaxsparse
from torch_bridge._errors import BridgeError
from torch_bridge.dlpack import jax_to_torch, torch_to_jax
from torch_bridge.function import jax2torch
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
