"""How long a layer takes: the machine's rates times how well each format uses them.

    t = c0 call + c1 arithmetic + c2 weights + c3 activations + c4 entries

Each term is the time in which the machine could do its part, from its `Profile`: one call; the operations at the rate
of a large product of its kind; weights, and input and output, read or written once by each product; and the operations
of one more row, for what each stored number costs whatever the number of rows. The five factors are fitted to measured
layers (benchmarks/costs_fit.py) for each framework, format and mode, at some sizes of blocks or numbers of rows,
between which they are interpolated by the logarithm.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsparse.costs.layers import Layer
from jaxsparse.costs.machine import Profile

TABLE = Path(__file__).with_name("fitted.json")
TERMS = ("call", "arithmetic", "weights", "activations", "entries")
_INDEX = 4  # bytes of an entry's place
_DENSE_WORK = 512  # features of a diagonal block
_ADAM = 7  # numbers that an update reads or writes for each weight: weight, gradient and two moments


def seconds(layer: Layer, profile: Profile, mode: str) -> float:
    """The predicted time of a call.

    Args:
      mode: "forward"; "gradients", which is forward and backward pass; "step", with Adam after that.
    """
    if mode == "step":
        return seconds(layer, profile, "gradients") + _update(layer, profile)
    fitted = _table()[profile.framework][layer.kernels]
    factor = fitted["dtypes"].get(layer.dtype, 1.0)
    parts = terms(layer, profile, mode)
    factors = _between(fitted["knots"], fitted[mode], place(layer, fitted["axis"]))
    return parts[0] * factors[0] + factor * sum(c * t for c, t in zip(factors[1:], parts[1:], strict=True))


def margin() -> float:
    """Ratios of two predicted times within this factor of 1 say too little: outside of it they were right on which is
    faster in 98 of 100 cells."""
    return _table()["margin"]


def terms(layer: Layer, profile: Profile, mode: str) -> tuple[float, ...]:
    """Seconds of the five terms."""
    products = 1 if mode == "forward" else 3
    rate = _rate(layer, profile)
    weights = layer.weight_bytes + (_INDEX * layer.stored if layer.index_bytes else 0)
    return (
        profile.calls[mode],
        products * layer.operations / rate,
        products * weights / profile.memory_rate(weights),
        products * layer.activation_bytes / profile.memory_rate(layer.activation_bytes),
        products * 2 * layer.weights / rate,
    )


def _rate(layer: Layer, profile: Profile) -> float:
    """Operations a second: diagonal blocks as large as dense layers are multiplied as such."""
    if layer.kind == "dense" or (layer.kind == "block_diag" and min(layer.block) >= _DENSE_WORK):
        return profile.rate(layer.dtype)
    return profile.kernels["entries" if layer.kernels == "sparse" else "blocks"]


def place(layer: Layer, axis: str) -> float:
    """Where a layer is on the axis along which the factors of its format change."""
    return math.sqrt(math.prod(layer.block)) if axis == "side" else layer.batch


def shares(knots: Sequence[float], where: float) -> list[float]:
    """How much each knot counts at a place: the two beside it, by the logarithm; beyond the ends, the last one."""
    inside = min(max(where, knots[0]), knots[-1])
    found = [0.0] * len(knots)
    for k, (a, b) in enumerate(zip(knots, [*knots[1:], math.inf], strict=True)):
        if a <= inside < b:
            part = math.log(inside / a) / math.log(b / a) if b < math.inf else 0.0
            found[k] = 1 - part
            if part:
                found[k + 1] = part
    return found


def _between(knots: Sequence[float], factors: Sequence[Sequence[float]], where: float) -> list[float]:
    weights = shares(knots, where)
    return [sum(w * f[term] for w, f in zip(weights, factors, strict=True)) for term in range(len(TERMS))]


def _update(layer: Layer, profile: Profile) -> float:
    """Of Adam: what it costs beside the call, and its way through memory."""
    size = layer.weight_bytes
    return profile.calls["step"] - profile.calls["gradients"] + _ADAM * size / profile.memory_rate(4 * size)


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())
