"""PyTorch on top of JAX: functions, Flax models and sparse layers as torch functions and modules with gradients."""

from torch_bridge.autograd import jax2torch
from torch_bridge.dlpack import BridgeError, jax_to_torch, torch_to_jax

__all__ = ["BridgeError", "jax2torch", "jax_to_torch", "torch_to_jax"]
