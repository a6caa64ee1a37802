"""Tensors between torch and JAX: copies for everyone, shared memory for the bridge, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import core
from torch import Tensor

from torch_bridge._errors import BridgeError
from torch_bridge._process import note_use, warn_of_preallocation
from torch_bridge._views import Views
from torch_bridge._watch import is_plain

_OF_32_BITS = {torch.int64: torch.int32, torch.uint64: torch.uint32}
_LOSSY = {torch.float64: "float()", torch.complex128: "to(torch.complex64)"}
_SIZED = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_IN_NUMPY = frozenset(
    getattr(torch, name) for name in ["float16", "float32", "float64", "complex64", "complex128", "bool", *_SIZED]
)
_ALIGNMENT = 64  # bytes: what JAX wants before it reads a CPU buffer in place


def torch_to_jax(tree: Any) -> Any:
    """Copies every torch tensor in a pytree into a jax.Array; other leaves stay as they are.

    The copies own their memory: writing to the tensors afterwards never changes the arrays.

    Args:
      tree: any pytree. Tensors must be dense, on cpu or cuda; strides, offsets and lazy negation or
        conjugation are all fine, and gradients are not followed (that is `jax2torch`).
    Returns:
      The same tree with jax.Arrays of the same shape and dtype. Where JAX runs without 64-bit types,
      int64 becomes int32 (uint64 becomes uint32) after a check that every value fits.
    Raises:
      BridgeError: for sparse tensors, for devices that JAX does not share, for integers that do not fit,
        and for float64 and complex128 unless `jax_enable_x64` is set.
    """
    return jax.tree.map(lambda leaf: share(ready(leaf).clone()) if isinstance(leaf, Tensor) else leaf, tree)


def jax_to_torch(tree: Any) -> Any:
    """Copies every jax.Array in a pytree into a torch tensor; other leaves stay as they are.

    They are copies because torch tensors are writable and a jax.Array must never change.

    Args:
      tree: any pytree of concrete arrays, each on one device.
    Returns:
      The same tree with tensors of the same shape and dtype, on the array's device.
    Raises:
      BridgeError: for PRNG key arrays, tracers, arrays spread over several devices, and dtypes that
        torch does not have.
    """
    return jax.tree.map(lambda leaf: receive(leaf).clone() if isinstance(leaf, jax.Array) else leaf, tree)


def ready(t: Tensor) -> Tensor:
    """`t`, or a copy, in a form that JAX reads in place and reads correctly.

    What JAX would get wrong or do late is done here, by torch, before this returns: lazy negation (a DLPack
    export loses the sign), strides (refused, or one compilation per layout), misalignment (JAX copies later,
    in a race with torch's next write), 64-bit types (JAX narrows them without a word), zeros without memory, as forward
    mode makes them.
    """
    if t.requires_grad:
        t = t.detach()
    _check_kind(t)
    if t.is_neg() or t.is_conj():
        t = t.resolve_conj().resolve_neg()
    if t._is_zerotensor():
        t = torch.zeros_like(t)
    if t.dtype in _OF_32_BITS and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        t = _in_32_bits(t)
    if not t.is_contiguous():
        t = t.contiguous()
    if t.is_cpu and _address(t) % _ALIGNMENT:
        t = t.clone()
    return t


def operand(t: Tensor) -> Any:
    """`t` as an argument of a jitted call that is waited for: a view of its memory, or of a `ready` copy."""
    t = ready(t)
    if t.is_cpu and t.dtype in _IN_NUMPY and not _jax_has_gpu():
        note_use()
        return t.numpy()  # ten times cheaper than DLPack
    return share(t)


def share(t: Tensor) -> jax.Array:
    """A jax.Array in the memory of a `ready` tensor. On a GPU, JAX reads it after what torch's stream does now."""
    note_use()
    try:
        if not t.is_cuda:
            return jax.dlpack.from_dlpack(t)
        warn_of_preallocation()
        with torch.cuda.device(t.device):  # torch exports from its current device only
            return jax.dlpack.from_dlpack(t)
    except (BufferError, RuntimeError) as error:
        here = "" if _jax_has_gpu() or not t.is_cuda else " JAX has no GPU here: install jax[cuda12] or jax[cuda13]."
        raise BridgeError(
            f"{t.dtype} on {t.device} cannot be shared with JAX ({error}). Convert or move it first.{here}"
        ) from error


def receive(a: jax.Array) -> Tensor:
    """A fresh result of a jitted call as a tensor that owns it.

    This waits for the whole computation on CPU, and makes torch's stream wait on a GPU: torch cannot write to
    the operands before JAX has read them.
    """
    try:
        return torch.from_dlpack(a if _jax_has_gpu() else a.__dlpack__())  # a capsule is cheaper, and has no stream
    except Exception as error:
        raise BridgeError(_why_not_torch(a, error)) from error


def kept_operand(views: Views, place: str | None, t: Tensor) -> Any:
    """The operand at this place of a call, by its kept view if it has one."""
    if place not in views.kept or not t.is_leaf:
        return operand(t)
    kept = views.kept[place]
    if kept is not None and kept[0] == _place(t):
        return kept[1]
    r = ready(t)
    view = share(r)
    views.kept[place] = (_place(t), view) if _place(r) == _place(t) else None  # a copy is not worth keeping
    return view


def _place(t: Tensor) -> tuple:
    """Equal for tensors that are the same memory, read in the same way."""
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg(), t.is_conj()


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError as error:
        raise BridgeError(
            f"this tensor has no memory of its own ({error}). autograd.grad(is_grads_batched=True) makes such ones; "
            "torch.func.vmap and jacrev work."
        ) from error


def _check_kind(t: Tensor) -> None:
    if not is_plain(t):
        raise BridgeError(
            f"a {type(t).__name__} says itself what torch's operators do with it, and JAX reads plain memory. Make a "
            "plain tensor of it (a DTensor's to_local() or full_tensor()), or call under the mode that it belongs to."
        )
    if t.layout is not torch.strided:
        raise BridgeError(
            f"a tensor of layout {t.layout} is not dense, and JAX reads only dense memory. Call .to_dense()."
        )
    if t.device.type not in ("cpu", "cuda"):
        hint = "Give it values first (to_empty, load_state_dict)." if t.is_meta else "Move it to cpu or cuda."
        raise BridgeError(f"a tensor on {t.device} has no memory that JAX can read. {hint}")
    if t.dtype in _LOSSY and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise BridgeError(
            f"{t.dtype} would lose precision, because JAX runs with 64-bit types disabled. Convert it "
            f"yourself with .{_LOSSY[t.dtype]}, or call jax.config.update('jax_enable_x64', True) at "
            "start-up."
        )


def _why_not_torch(a: jax.Array, error: Exception) -> str:
    if isinstance(a, core.Tracer):
        return (
            f"{a.dtype}{list(a.shape)} is a tracer: inside jit, grad or vmap there is no array yet to hand "
            "to torch. Return it, and convert the result outside."
        )
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return "a PRNG key array has no torch counterpart. Convert jax.random.key_data(key) instead."
    if len(a.devices()) > 1:
        return (
            f"an array over {len(a.devices())} devices has no torch counterpart. Gather it first: "
            "jax.device_put(a, jax.devices()[0])."
        )
    return f"JAX's {a.dtype} has no torch counterpart ({error}). Convert it first, with a.astype(...)."


def _in_32_bits(t: Tensor) -> Tensor:
    """A 64-bit integer tensor in 32 bits, if nothing is lost."""
    small = t.to(_OF_32_BITS[t.dtype])
    if torch.equal(small.to(t.dtype), t):
        return small
    bits = torch.iinfo(small.dtype)
    bad = t[small.to(t.dtype) != t].flatten()
    raise BridgeError(
        f"{t.dtype} holds {bad.numel()} values outside {bits.min} to {bits.max}, {bad[0].item()} among "
        "them, and JAX runs with 64-bit types disabled. Call jax.config.update('jax_enable_x64', True) at "
        "start-up to keep them."
    )


@functools.cache
def _jax_has_gpu() -> bool:
    note_use()
    return jax.default_backend() == "gpu"
