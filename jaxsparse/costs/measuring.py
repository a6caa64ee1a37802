"""`measure`: a layer of random weights raced against the dense one, on this machine."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path

from jaxsparse._sizes import grid_of
from jaxsparse.costs import layers, machine, model
from jaxsparse.costs.layers import Layer
from jaxsparse.costs.racing import Race, race
from jaxsparse.costs.words import amount, milliseconds

_KINDS = ("block_diag", "block_sparse", "sparse")
_CALLS = 9  # of each layer, at least, in a race
_LONGEST = 20_000  # milliseconds of a call
_HELD = {"forward": 1, "gradients": 2, "step": 6}  # copies of the weights: with gradients, moments and their updates


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `measure` found; `print` shows it in words.

    Attributes:
      layer: the sparse layer.
      forward: the race of the forward passes.
      step: the race of the training steps, forward and backward pass and Adam; None unless `train`.
    """

    layer: Layer
    forward: Race
    step: Race | None = None

    def __str__(self) -> str:
        lines = [f"{self.layer}, forward: {self.forward}"]
        return "\n".join(lines + ([f"{self.layer}, training step: {self.step}"] if self.step else []))


def measure(
    in_features: int,
    out_features: int,
    batch: int,
    density: float,
    *,
    kind: str | None = None,
    block: int | tuple[int, int] | None = None,
    dtype: str = "float32",
    train: bool = False,
    torch: bool = False,
    seconds: float = 2.0,
) -> Measured:
    """Races a sparse layer against the dense one of its size, both with random weights and no bias.

        print(jaxsparse.measure(2048, 2048, batch=256, density=0.1, block=32, train=True))

    The two take turns, and a two-sided sign test over the turns decides. Where it can't, `faster` is None.

    Args:
      in_features, out_features, batch, density, block, dtype, torch: as for `jaxsparse.explain`.
      kind: "block_diag", "block_sparse" or "sparse"; None means block-sparse where there is a block, else unstructured.
      train: race training steps too: forward and backward pass, and Adam.
      seconds: for each race; close ones and slow layers may take longer.
    Returns:
      A text, for `print`, and the races.
    Raises:
      ValueError: for sizes, densities, blocks and dtypes that are none, and for layers that would not fit in the memory
        that is free, or would take too long.
      ImportError: if the framework is not installed.
    """
    layers.check(in_features, out_features, batch, density, dtype)
    kind = kind or ("sparse" if block is None else "block_sparse")
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: there is {', '.join(map(repr, _KINDS))}.")
    if block is not None and kind != "block_sparse":
        raise ValueError(f"block={block!r} is for kind='block_sparse', not for {kind!r}.")
    place = (in_features, out_features), batch, density
    if kind == "block_sparse":
        layer = layers.block_sparse(*place, 32 if block is None else block, dtype)
    else:
        layer = (layers.sparse if kind == "sparse" else layers.block_diag)(*place, dtype)
    modes, profile = ("forward", "step") if train else ("forward",), machine.profile(torch)
    both = layer, layers.dense(layer.shape, batch, dtype)
    predicted = 1e3 * max(model.seconds(one, profile, modes[-1]) for one in both)
    return Measured(layer, **contest(layer, modes, torch, seconds, predicted))


def contest(layer: Layer, modes: tuple[str, ...], torch: bool, seconds: float, predicted: float) -> Mapping[str, Race]:
    """A race against dense for each mode.

    Args:
      predicted: milliseconds of the slowest call.
    Raises:
      ValueError: for a layer that is impossible, would not fit or would take too long.
    """
    dense = layers.dense(layer.shape, layer.batch, layer.dtype)
    _check_possible(layer, dense, modes, predicted)
    side = importlib.import_module(machine.FRAMEWORKS["torch" if torch else "jax"])
    with side.wide(layer.dtype):
        made = [side.steps(one, modes) for one in (dense, layer)]
        return {mode: race(pair, seconds) for mode, pair in zip(modes, zip(*made, strict=True), strict=True)}


def _check_possible(layer: Layer, dense: Layer, modes: tuple[str, ...], predicted: float) -> None:
    if layer.why_impossible:
        raise ValueError(f"{layer.why_impossible}: use larger blocks, or a lower density.")
    needed, free = _needed(layer, modes) + _needed(dense, modes), free_memory()
    if needed > free:
        raise ValueError(
            f"the dense layer and this one need about {amount(needed, 'B')}, and {amount(free, 'B')} of memory are "
            "free. Give fewer rows or features; jaxsparse.explain predicts without making them."
        )
    if predicted > _LONGEST:
        raise ValueError(
            f"a call is predicted to take {milliseconds(predicted)}, and a race needs {_CALLS} of each layer. Give "
            "fewer rows or features; jaxsparse.explain predicts without running them."
        )


def _needed(layer: Layer, modes: tuple[str, ...]) -> int:
    """Bytes: weights in as many copies as a mode holds, the rest twice, and the draw of the pattern."""
    held = sum(_HELD[mode] for mode in modes)
    places = grid_of(layer.shape, layer.block) if layer.index_bytes else (0, 0)
    return held * layer.weight_bytes + 2 * (layer.index_bytes + layer.temporary_bytes) + 8 * places[0] * places[1]


def free_memory() -> int:
    """Bytes that this process could still take, as far as the system tells."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # of a container
        group = Path("/sys/fs/cgroup")
        most, now = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - now)
    except (OSError, ValueError):
        pass
    return free
