"""A Flax Linen module as a pure function of leaves, for `from_flax`."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen

from torch_bridge._errors import BridgeError

_TRAIN_NAMES = ("train", "training", "is_training")
_EVAL_NAMES = ("deterministic", "eval", "use_running_average")


class LinenCall:
    """Calls a Linen module on its leaves.

    Attributes:
      name: of the module's class.
      names: dotted Flax path of every leaf, in the order of the leaves.
      is_param: whether a leaf is in the "params" collection.
    """

    def __init__(self, module: linen.Module, variables, *, rngs: tuple[str, ...], train_kwarg: str | None, method):
        self.name, self.module, self.rngs, self.method = type(module).__name__, module, rngs, method
        self.train_kwarg = _guess_train_kwarg(module, method) if train_kwarg == "auto" else train_kwarg
        leaves = self.flatten(variables)
        self.names = [name for name, _ in leaves]
        self.is_param = [name.startswith("params.") for name in self.names]
        self.template = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), _plain(variables)
        )

    def flatten(self, variables) -> list[tuple[str, Any]]:
        """(dotted path, leaf) of every leaf."""
        paths, _ = jax.tree.flatten_with_path(_plain(variables))
        return [(dotted(path), leaf) for path, leaf in paths]

    def assemble(self, leaves) -> dict:
        """The variables that have these leaves."""
        return jax.tree.unflatten(jax.tree.structure(self.template), leaves)

    def __call__(self, leaves, seed, training: bool, *args, **kwargs) -> tuple[Any, dict[int, jax.Array]]:
        """The module's output, and the leaves that the call has changed, by their number."""
        variables = self.assemble(leaves)
        if self.train_kwarg:
            name = self.train_kwarg.removeprefix("not ")
            kwargs.setdefault(name, training if name == self.train_kwarg else not training)
        mutable = [name for name in variables if name != "params"] if training else False
        rngs = self._keys(seed, training)
        out = self.module.apply(variables, *args, rngs=rngs, mutable=mutable, method=self.method, **kwargs)
        if mutable is False:
            return out, {}
        out, new = out  # pyright: ignore[reportGeneralTypeIssues]
        known = dict(zip(self.names, enumerate(leaves), strict=True))
        pairs = [(*known[name], leaf) for name, leaf in self.flatten(new) if name in known]
        return out, {i: leaf for i, old, leaf in pairs if leaf is not old}

    def _keys(self, seed, training: bool) -> dict[str, jax.Array]:
        """One key per stream; for "dropout" only in training, as modules take its presence for the mode."""
        key = as_key(seed)
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(self.rngs)}
        return keys if training else {name: k for name, k in keys.items() if name != "dropout"}


def as_key(seed: jax.Array | None) -> jax.Array:
    """A PRNG key of two int32 words; of zeros for calls that are known not to use it."""
    seed = jnp.zeros(2, jnp.int32) if seed is None else seed
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")


def dotted(path: tuple) -> str:
    """A pytree path as a state_dict key."""
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    for part in parts:
        if "." in part or not part:
            raise BridgeError(
                f"{part!r}, in the Flax path {parts}, cannot be part of a torch parameter name. Rename it."
            )
    return ".".join(parts)


def _plain(variables) -> dict:
    return linen.unbox(core.unfreeze(variables))


def _guess_train_kwarg(module: linen.Module, method) -> str | None:
    call: Any = getattr(module, method) if isinstance(method, str) else method or type(module).__call__
    names = inspect.signature(call).parameters
    spelled = [*((name, name) for name in _TRAIN_NAMES), *((name, f"not {name}") for name in _EVAL_NAMES)]
    return next((kwarg for name, kwarg in spelled if name in names), None)
