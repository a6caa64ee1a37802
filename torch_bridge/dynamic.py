"""Patterns that move while a torch layer is trained, by RigL and SET: weight, gradient, moments and buffers, in place.

    y = layer(x)
    y.retain_grad()
    loss(y).backward()
    optimizer.step()
    dynamic.rigl(layer, optimizer, x=x, dy=y.grad, drop_fraction=0.3)

The decisions are those of `jaxsparse.dynamic`, on the same numbers. What is kept takes its value, gradient and moments
along bit by bit; what is grown starts at zero in all of them. Parameter and buffers stay the same tensors, so that
optimizers, hooks and references go on working.

Every process must make the same move: under DistributedDataParallel, gather `x` and `dy` of all ranks first, and seed
torch alike. A moving average of the weight must move along, as one of `averages`, or begin anew: no check can see that
numbers of two patterns were mixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from jaxsparse import dynamic
from torch_bridge.dlpack import jax_to_torch, torch_to_jax
from torch_bridge.nn import BlockSparseLinear


def rigl(
    layer: BlockSparseLinear,
    optimizer: torch.optim.Optimizer | None,
    *,
    x: Tensor,
    dy: Tensor,
    drop_fraction: float,
    averages: Iterable[BlockSparseLinear] = (),
) -> None:
    """Drops the stored entries of least magnitude, and grows as many where the dense gradient x^T dy is largest.

    Args:
      layer: changed in place: pattern, weight and the weight's gradient, if it has one.
      optimizer: holds the weight; its state that has one number, or one block, per entry moves along. None for none.
      x: [*batch, in], the layer's input.
      dy: [*batch, out], the gradient of the loss by the layer's output.
      drop_fraction: of the stored entries, 0 to 1; it may change from call to call, and nothing is compiled anew.
      averages: layers of the same pattern that move along: with an average of this one's weight, or with the same.
    Raises:
      ValueError: for shapes that don't fit, a drop fraction outside [0, 1], an optimizer that does not hold the
        weight, and averages of another pattern.
      NotImplementedError: for a weight that is sharded or parametrized, and for state that belongs to the weight in
        a way not known here. Whatever is raised, nothing has changed.
    Source: Algorithm 1 of Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134.
    """
    batch = {name: torch_to_jax(t.detach().float()) for name, t in (("x", x), ("dy", dy))}
    _move(layer, optimizer, averages, drop_fraction, functools.partial(dynamic.rigl, **batch))


def set_(
    layer: BlockSparseLinear,
    optimizer: torch.optim.Optimizer | None,
    *,
    drop_fraction: float,
    averages: Iterable[BlockSparseLinear] = (),
) -> None:
    """Drops the stored entries of least magnitude, and grows as many at random, from torch's generator.

    Args and raises: as `rigl`.
    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
      inspired by network science", arXiv:1707.04780.
    """
    _move(layer, optimizer, averages, drop_fraction, functools.partial(dynamic.set_, _draw_key()))


def _move(layer, optimizer, averages, drop_fraction: float, choose: Callable[..., tuple]) -> None:
    """Lets `choose` find the new pattern, and moves everything that is stored in the order of the old one."""
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction={drop_fraction} is outside [0, 1]: it is a fraction of the stored entries.")
    layers = [layer, *averages]
    for one in layers:
        if not isinstance(one, BlockSparseLinear):
            raise TypeError(f"a {type(one).__name__} has no pattern that moves; SparseLinear and BlockSparseLinear do.")
    weights = {id(one.weight): _weight_and_gradient(one, layer) for one in layers}  # each once, where layers share it
    moving = [t for pair in weights.values() for t in pair]
    moving += _state_of(layer.weight, optimizer) if optimizer is not None else []
    pattern, weight = layer.pattern, torch_to_jax(layer.weight.detach().float())
    # Handed over as the optimizer's state: it comes back as the numbers of the entries that are kept, 0 for the grown.
    number = jnp.arange(1, pattern.nnzb + 1, dtype=jnp.int32).reshape(-1, *(1,) * (weight.ndim > 1))
    number = jnp.broadcast_to(number, weight.shape[:2])
    _, new, number = choose(weight, pattern, number, drop_fraction=jnp.float32(drop_fraction))
    source = jax_to_torch(number).reshape(pattern.nnzb, -1)[:, :1].flatten().to(layer.weight.device) - 1
    with torch.no_grad():
        for t in moving:
            t.copy_(_take(t, source))
    for one in layers:
        one._guard.fill(one._buffers, new.index)


def _draw_key() -> jax.Array:
    return jax.random.key(int(torch.randint(2**31 - 1, (), device="cpu").item()))


def _weight_and_gradient(one: BlockSparseLinear, layer: BlockSparseLinear) -> list[Tensor]:
    """What moves of a layer, which has the pattern of `layer`."""
    weight = one._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        what = "parametrized or flattened" if weight is None else f"a {type(weight).__name__}"
        raise NotImplementedError(
            f"the weight is {what}, and only a plain parameter moves with its pattern. Move the pattern before the "
            "weight is parametrized or sharded."
        )
    if not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one._index(), layer._index(), strict=True)):
        raise ValueError(
            "one of the averages has another pattern than the layer, and cannot move along: begin it anew."
        )
    return [weight.detach()] if weight.grad is None else [weight.detach(), weight.grad.detach()]


def _state_of(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state that hold one number, or one block, for each entry of the weight."""
    if not any(p is weight for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer does not hold this layer's weight: its moments would stay behind. Hand over the one that "
            "does, or None."
        )
    state, moving = optimizer.state.get(weight, {}), []
    for name, value in state.items():
        if isinstance(value, Tensor) and _fits(value, weight):
            moving.append(value)
        elif isinstance(value, Tensor) and value.numel() == 1 or value is None or isinstance(value, (int, float, str)):
            pass  # of the weight as a whole, such as the number of steps
        else:
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise NotImplementedError(
                f"{type(optimizer).__name__} keeps {name!r} of {what} for a weight of {list(weight.shape)}, and how "
                "that moves with the pattern is not known. Use an optimizer whose state has the weight's shape."
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError("LBFGS keeps its history of all parameters in one vector, which does not move.")
    return moving


def _fits(value: Tensor, weight: Tensor) -> bool:
    """Whether a tensor of the state has the weight's shape, or 1 for the rows or columns of its blocks."""
    pairs = zip(value.shape[1:], weight.shape[1:], strict=False)
    return value.ndim == weight.ndim and value.shape[0] == weight.shape[0] and all(a in (1, b) for a, b in pairs)


def _take(t: Tensor, source: Tensor) -> Tensor:
    """t[source], zero where the source is negative."""
    grown = (source < 0).reshape(-1, *(1,) * (t.ndim - 1))
    return t.index_select(0, source.clamp(min=0)).masked_fill(grown, 0)
