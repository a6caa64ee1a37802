"""Who else looks at a call: torch.func's transforms, tracers that make a graph of it, modes that see every operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from torch_bridge._errors import BridgeError

_PLAIN = (Tensor, torch.nn.Parameter)


def _probe(name: str, otherwise: int) -> Callable[..., Any]:
    """One of torch's private functions. Where it is missing, a guess that is slower, and right."""
    return getattr(torch._C, name, lambda *_: otherwise)


_transforms = _probe("_are_functorch_transforms_active", 1)
_top_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_disable_transforms = getattr(torch._C, "_DisableFuncTorch", contextlib.nullcontext)
_tracer = _probe("_get_tracing_state", 1)
_set_tracer = _probe("_set_tracing_state", 0)
any_autocast = _probe("_is_any_autocast_enabled", 1)
_modes = _probe("_len_torch_dispatch_stack", 1)
_function_modes = _probe("_len_torch_function_stack", 1)
# Modes that stand before autograd have a stack of their own.
_EARLY = getattr(torch._C.DispatchKey, "PreDispatch", None)
_key_is_on = _probe("_dispatch_tls_is_dispatch_key_included", 0) if _EARLY is not None else (lambda _: 0)


def is_plain(t: Tensor) -> bool:
    """Whether a tensor is what its memory says. A DTensor, a fake or a quantized one says itself what it is."""
    return type(t) in _PLAIN or not _dispatches_itself(type(t))


def transforms_active() -> bool:
    return bool(_transforms()) or getattr(forward_ad, "_current_level", 0) >= 0


def functionalizes() -> bool:
    """Whether the transform that comes next is torch.func.functionalize, which takes operators only."""
    top = _top_transform()
    return top is not None and top.key().name == "Functionalize"


def is_traced() -> bool:
    """Whether torch.jit.trace records."""
    return _tracer() is not None


@contextlib.contextmanager
def unseen_by_trace() -> Iterator[None]:
    """Lets torch.jit.trace overlook what is done; otherwise the sizes of tensors are tensors there."""
    state = _tracer()
    if state is None:
        yield
        return
    _set_tracer(None)
    try:
        yield
    finally:
        _set_tracer(state)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Turns dispatch modes and transforms off, for what is no part of a computation."""
    with _disable_current_modes(), _disable_transforms():
        yield


def is_seen() -> bool:
    """Whether a tracer or a mode wants to know of every operator.

    What happens outside of torch is invisible to them, and its result a constant. So a call must be one operator then.
    """
    return bool(
        _tracer() is not None or _modes() or _key_is_on(_EARLY) or (_function_modes() and _looks_at_functions())
    )


def refuse_script(module: Any) -> Any:
    """What torch.jit.script calls, as `__prepare_scriptable__`, before it compiles a module or one that holds it."""
    raise BridgeError(
        f"torch.jit.script compiles Python, and the work of {type(module).__name__} is done in C++ or in JAX. Use "
        "torch.jit.trace, torch.export.export or torch.compile, which keep that as one operator."
    )


def refuse_symbols(x: Any) -> None:
    """Raises BridgeError for what torch.fx.symbolic_trace passes instead of tensors."""
    if isinstance(x, torch.fx.Proxy):
        raise BridgeError(
            "torch.fx.symbolic_trace can't look into JAX. Use torch.export.export or torch.compile, or a "
            "torch.fx.Tracer whose is_leaf_module says that this module stays whole."
        )


def _dispatches_itself(kind: Any) -> bool:
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _looks_at_functions() -> bool:
    """Whether there is a mode other than that of torch.set_default_device, which changes factories only."""
    return any(not isinstance(mode, DeviceContext) for mode in _function_mode_stack())


def _function_mode_stack() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(_function_modes())]
