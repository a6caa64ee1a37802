"""A Flax NNX model as a pure function of leaves, for `from_flax`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from torch_bridge._errors import BridgeError
from torch_bridge._linen import as_key, dotted


class NNXCall:
    """Calls an NNX model on its leaves; its random state comes from a seed instead.

    Attributes:
      name: of the model's class.
      names: dotted Flax path of every leaf, in the order of the leaves.
      is_param: whether a leaf is (part of) an nnx.Param.
    """

    def __init__(self, model: nnx.Module):
        self.name = type(model).__name__
        model = nnx.clone(model)  # the caller's keeps its own mode
        self.graphs = {}
        for training in (False, True):
            model.train() if training else model.eval()
            self.graphs[training], *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
        params, random, rest = states
        leaves = self.flatten(nnx.merge_state(params, rest))
        self.names = [name for name, _ in leaves]
        self.is_param = [name in {name for name, _ in self.flatten(params)} for name in self.names]
        self.template = _abstract(nnx.merge_state(params, rest))
        self.random = _abstract(random)

    def flatten(self, variables: nnx.State) -> list[tuple[str, Any]]:
        """(dotted path, leaf) of every leaf but the random state."""
        state = nnx.filter_state(variables, nnx.Not(nnx.RngState))
        found = []
        for path, variable in nnx.to_flat_state(state):
            inner, _ = jax.tree.flatten_with_path(variable.get_value())
            prefix = tuple(jax.tree_util.DictKey(part) for part in path)
            found += [(dotted(prefix + sub), leaf) for sub, leaf in inner]
        return found

    def assemble(self, leaves) -> nnx.State:
        """The state that has these leaves: what nnx.update(model, state) takes."""
        left = iter(leaves)
        flat = [
            (path, variable.replace(jax.tree.map(lambda _: next(left), variable.get_value())))
            for path, variable in nnx.to_flat_state(self.template)
        ]
        return nnx.from_flat_state(flat)

    def __call__(self, leaves, seed, training: bool, *args, **kwargs) -> tuple[Any, dict[int, jax.Array]]:
        """The model's output, and the leaves that the call has changed, by their number."""
        model = nnx.merge(self.graphs[training], self.assemble(leaves), self._random_state(seed))
        out = model(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        new = self.flatten(nnx.state(model))
        changed = {i: leaf for i, (_, leaf) in enumerate(new) if leaf is not leaves[i]}
        for i in changed:
            if self.is_param[i]:
                raise BridgeError(
                    f"the forward pass assigns to the nnx.Param {self.names[i]}, which torch's optimizers "
                    "and autograd own. Keep what a forward pass updates in another kind of nnx.Variable."
                )
        return out, changed

    def _random_state(self, seed: jax.Array | None) -> nnx.State:
        leaves, tree = jax.tree.flatten(self.random)
        key = as_key(seed)

        def fresh(i, leaf):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jnp.broadcast_to(jax.random.fold_in(key, i), leaf.shape)
            return jnp.zeros(leaf.shape, leaf.dtype)

        return jax.tree.unflatten(tree, [fresh(i, leaf) for i, leaf in enumerate(leaves)])


def _abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), tree)
