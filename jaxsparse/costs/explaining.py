"""`explain`: what a layer would store, compute and take in each format, and whether that pays. It makes no arrays."""

from __future__ import annotations

import dataclasses
import importlib
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.costs import layers, machine, model
from jaxsparse.costs.advising import advice
from jaxsparse.costs.layers import Layer
from jaxsparse.costs.measuring import contest
from jaxsparse.costs.racing import Race
from jaxsparse.costs.words import amount, milliseconds, table

_BUSY = 0.3  # cores of others, from which on rates are doubted
_WIDTH = 80  # of a terminal
BLOCKS = (8, 16, 32, 64, 128)  # sides for which the density is found at which a layer is as fast as dense


@dataclasses.dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
      layer: what it stores: `weights`, `density`, `weight_bytes` (of the gradients too), `moment_bytes` (Adam's two),
        `index_bytes` (the pattern), `temporary_bytes` (of a training step), `operations` (of a forward pass).
      forward, step: predicted milliseconds; a step is forward and backward pass and Adam.
      races: what was measured beside dense, by "forward" and "step".
      note: why there is no such layer, or why it was not measured.
    """

    layer: Layer
    forward: float
    step: float
    races: Mapping[str, Race] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def is_possible(self) -> bool:
        return self.layer.why_impossible is None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows it as tables.

    Attributes:
      rows: of dense, block-diagonal, block-sparse and unstructured, in this order.
      crossover: by side of the blocks, 1 for single entries: the density below which the layer is predicted to be
        faster than dense; 0 where it never is.
      advice: what to do, in a sentence or two.
      train: whether advice and crossover are about training steps, or forward passes.
      profile: the machine's rates.
    """

    rows: Sequence[Row]
    crossover: Mapping[int, float]
    advice: str
    train: bool
    profile: machine.Profile

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers: what `jaxsparse explain --json` prints."""
        dense = self.rows[0].layer
        return {
            "in_features": dense.shape[0],
            "out_features": dense.shape[1],
            "batch": dense.batch,
            "dtype": dense.dtype,
            "framework": self.profile.framework,
            "machine": self.profile.machine,
            "threads": self.profile.threads,
            "cores_busy_when_measured": self.profile.busy,
            "rates_estimated": list(self.profile.estimated),
            "formats": [_as_dict(row) for row in self.rows],
            "crossover": {str(side): density for side, density in self.crossover.items()},
            "crossover_of": "step" if self.train else "forward",
            "through_jax": _detour(self.profile),
            "advice": self.advice,
        }

    def __str__(self) -> str:
        dense, p = self.rows[0].layer, self.profile
        rows = f"{dense.batch} row{'s' if dense.batch > 1 else ''}"
        head = (
            f"{dense.shape[0]} to {dense.shape[1]} features, {rows}, {dense.dtype}\n"
            f"in {'PyTorch' if p.framework == 'torch' else 'JAX'} on {p.machine}, {p.threads} threads"
        )
        said = [f"{row.layer}: {row.note}." for row in self.rows if row.note]
        said += [f"Measured, {mode}, {row.layer}: {race}." for row in self.rows for mode, race in row.races.items()]
        detour = _detour(p)
        said += [f"Sparse layers go through JAX here: {detour.removesuffix('.')}."] if detour else []
        said += _doubts(p)
        notes = [line for each in said for line in _wrapped(each, first="")]
        below = [f"{'single entries' if b == 1 else f'{b}x{b}'} {_density(d)}" for b, d in self.crossover.items()]
        what = "training step" if self.train else "forward pass"
        pays = f"The {what} is predicted to be faster than dense below these densities:"
        return "\n".join(
            [head, "", *_memory(self.rows), "", *_time(self.rows), "", pays, *_wrapped(", ".join(below)), *notes]
            + ["", *_wrapped(self.advice, first="", others="")]
        )


def _detour(profile: machine.Profile) -> str | None:
    """Why torch's layers go through JAX here, if they do."""
    return importlib.import_module(machine.FRAMEWORKS["torch"]).detour() if profile.framework == "torch" else None


def _doubts(profile: machine.Profile) -> list[str]:
    """What a busy machine did to its rates."""
    said = []
    if profile.busy > _BUSY:
        said.append(
            f"Others kept {profile.busy:.1f} cores busy while the machine's rates were measured, so that these are too "
            "low."
        )
    if profile.estimated:
        said.append(
            "The machine was too busy to measure all its rates in time. These are estimated by the others: "
            f"{', '.join(profile.estimated)}."
        )
    if said:
        said[-1] += f" Delete {machine.cache_file(profile.framework)} when it is quiet."
    return said


def explain(
    in_features: int,
    out_features: int,
    batch: int,
    density: float,
    *,
    block: int | tuple[int, int] | None = None,
    dtype: str = "float32",
    train: bool = False,
    torch: bool = False,
    measured: bool = False,
) -> Explanation:
    """What a linear layer costs dense, block-diagonal, block-sparse and unstructured, on this machine's CPU.

        print(jaxsparse.explain(4096, 4096, batch=256, density=0.1))

    The times are predicted, from the machine's rates and from measured layers (docs/where_it_pays.md). The first call
    on a machine measures the rates, in less than ten seconds, and keeps them in ~/.cache/jaxsparse, or where the
    environment variable JAXSPARSE_CACHE says.

    Args:
      in_features, out_features: sizes of the layer, at least 1; it has no bias.
      batch: rows of the input.
      density: the fraction of the weights that is kept. Block-diagonal layers take the number of blocks that comes
        nearest to it.
      block: of the block-sparse layer, a side or (i, o); 32 where none is given. Sides larger than the layer are cut.
      dtype: "float32", "bfloat16", "float16" or "float64".
      train: whether the advice is about training steps: forward and backward pass, and Adam.
      torch: in PyTorch instead of JAX.
      measured: also measure, where it fits: each format raced against dense, as `jaxsparse.measure` does.
    Returns:
      A text, for `print`, and the numbers.
    Raises:
      ValueError: for sizes below 1, a density outside of [0, 1], an unknown dtype or a block that is none.
      ImportError: if the framework is not installed.
    """
    layers.check(in_features, out_features, batch, density, dtype)
    shape, profile = (in_features, out_features), machine.profile(torch)
    formats = [
        layers.dense(shape, batch, dtype),
        layers.block_diag(shape, batch, density, dtype),
        layers.block_sparse(shape, batch, density, 32 if block is None else block, dtype),
        layers.sparse(shape, batch, density, dtype),
    ]
    rows = [_row(layer, profile) for layer in formats]
    if measured:
        modes = ("forward", "step") if train else ("forward",)
        rows = [rows[0], *(_measured(row, rows[0], modes, torch) for row in rows[1:])]
    mode = "step" if train else "forward"
    crossover = {b: _crossover(formats[0], b, profile, mode) for b in (1, *BLOCKS) if b <= min(shape)}
    return Explanation(rows, crossover, advice(rows, crossover, mode), train, profile)


def _row(layer: Layer, profile: machine.Profile) -> Row:
    forward, step = (1e3 * model.seconds(layer, profile, mode) for mode in ("forward", "step"))
    return Row(layer, forward, step, note=layer.why_impossible or "")


def _measured(row: Row, dense: Row, modes: tuple[str, ...], torch: bool) -> Row:
    if not row.is_possible:
        return row
    try:
        races = contest(row.layer, modes, torch, seconds=0.8, predicted=max(dense.step, row.step))
    except ValueError as error:
        return dataclasses.replace(row, note=f"not measured: {str(error).rstrip('.')}")
    return dataclasses.replace(row, races=races)


def _crossover(dense: Layer, side: int, profile: machine.Profile, mode: str) -> float:
    """By halving: the prediction grows with the density."""
    limit = model.seconds(dense, profile, mode)

    def is_faster(density: float) -> bool:
        place = dense.shape, dense.batch, density
        layer = layers.sparse(*place, dense.dtype) if side == 1 else layers.block_sparse(*place, side, dense.dtype)
        return model.seconds(layer, profile, mode) < limit

    low, high = 1 / math.prod(dense.shape), 1.0
    if is_faster(high):
        return 1.0
    if not is_faster(low):
        return 0.0
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return low


# ---- tables and dicts -------------------------------------------------------------------------------------


def _memory(rows: Sequence[Row]) -> list[str]:
    lines = [["bytes", "density", "weights", "pattern", "gradients", "moments", "temporary"]]
    for row in rows:
        held = row.layer
        sizes = (held.weight_bytes, held.index_bytes, held.weight_bytes, held.moment_bytes, held.temporary_bytes)
        lines.append([str(held), f"{held.density:.3g}", *(amount(size, "B") for size in sizes)])
    return table(lines, _WIDTH)


def _time(rows: Sequence[Row]) -> list[str]:
    lines = [("predicted time", "operations", "forward", "of dense", "step", "of dense")]
    dense = rows[0]
    for row in rows:
        ratios = (f"{row.forward / dense.forward:.2f}", f"{row.step / dense.step:.2f}")
        times = (milliseconds(row.forward), ratios[0], milliseconds(row.step), ratios[1])
        lines.append((str(row.layer), amount(row.layer.operations, ""), *times))
    return table(lines, _WIDTH)


def _wrapped(text: str, first: str = "  ", others: str = "  ") -> list[str]:
    """Lines; names of files and formats stay whole."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _density(number: float) -> str:
    return "always" if number == 1 else f"{number:.2g}" if number else "never"


def _as_dict(row: Row) -> dict[str, Any]:
    layer = row.layer
    return {
        "format": layer.kind,
        "density": layer.density,
        "block": list(layer.block),
        "weights": layer.weights,
        "weight_bytes": layer.weight_bytes,
        "pattern_bytes": layer.index_bytes,
        "gradient_bytes": layer.weight_bytes,
        "moment_bytes": layer.moment_bytes,
        "temporary_bytes": layer.temporary_bytes,
        "operations": layer.operations,
        "predicted_ms": {"forward": row.forward, "step": row.step},
        "measured": {
            mode: {"dense_ms": race.milliseconds[0], "ms": race.milliseconds[1], "faster": race.faster}
            for mode, race in row.races.items()
        },
        "note": row.note,
    }
