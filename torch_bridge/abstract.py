"""Tensors whose values are not there yet, as JAX traces them: dtypes, and shapes that may be symbolic in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import torch
from torch import Tensor

from torch_bridge import _watch
from torch_bridge._errors import BridgeError

# How JAX spells functions of symbolic dimensions, for torch's symbolic integers.
_FUNCTIONS = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": torch.sym_max,
    "min": torch.sym_min,
}


def trace(how: Callable, fn: Callable, tensors: Sequence[Tensor]) -> tuple[Any, Callable[[Any], Any]]:
    """Traces `fn` for such tensors.

    Sizes that are symbolic in torch are symbolic in JAX. Those on which the trace depends (features that must equal
    those of a kernel) become constants, as torch.compile specialises what a model branches on.

    Args:
      how: jax.eval_shape, or another function of (fn, *arrays) that traces.
      fn: a function of arrays.
      tensors: real, fake or batched tensors; only dtypes and shapes are looked at.
    Returns:
      What `how` returns, and a function from its dimensions to torch's sizes.
    """
    with _watch.unseen_by_trace():
        return _trace(how, fn, tensors)


def _trace(how: Callable, fn: Callable, tensors: Sequence[Tensor]) -> tuple[Any, Callable[[Any], Any]]:
    symbols = {str(s): s for t in tensors for s in t.shape if isinstance(s, torch.SymInt)}

    def attempt(free: Sequence[str], otherwise: Callable[[torch.SymInt], int]) -> tuple[Any, dict[str, Any]]:
        names = [f"d{i}" for i in range(len(free))]
        dims = {text: otherwise(s) for text, s in symbols.items() if text not in free}
        if free:
            known = jax.export.symbolic_shape(", ".join(names), constraints=[f"{name} >= 1" for name in names])
            dims = {**dims, **dict(zip(free, known, strict=True))}
        result = how(fn, *[_aval(t, lambda s: dims.get(str(s), s)) for t in tensors])
        return result, {name: symbols[text] for name, text in zip(names, free, strict=True)}

    def works(free: Sequence[str]) -> bool:
        try:
            attempt(free, lambda s: s.node.hint)  # the size of the example, with no promise that others equal it
        except Exception:  # whatever it is, it comes again below if these sizes are not the reason
            return False
        return True

    free = list(symbols)
    if free and not works(free):
        free = []
        for text in symbols:
            free += [text] if works([*free, text]) else []
    result, values = attempt(free, int)
    return result, lambda d: d if isinstance(d, int) else _size(d, {**_FUNCTIONS, **values})


def torch_dtype(dtype: Any) -> torch.dtype:
    """torch's dtype of the same name as JAX's.

    Raises:
      BridgeError: if there is none.
    """
    found = getattr(torch, jnp.dtype(dtype).name, None)
    if not isinstance(found, torch.dtype):
        raise BridgeError(f"JAX's {dtype} has no torch counterpart. Convert it first, with a.astype(...).")
    return found


def _aval(t: Tensor, dim: Callable[[Any], Any]) -> jax.ShapeDtypeStruct:
    dtype = jnp.dtype(str(t.dtype).removeprefix("torch."))
    return jax.ShapeDtypeStruct(tuple(map(dim, t.shape)), jax.dtypes.canonicalize_dtype(dtype))


def _size(dim: Any, values: dict[str, Any]) -> Any:
    """A symbolic dimension in torch's terms; JAX documents that it prints one as it parses it, `^` for powers."""
    return eval(str(dim).replace("^", "**"), {"__builtins__": {}}, values)
