"""The picture file of `jaxsparse show`: every pattern, or what moved in it, beside the histograms of its degrees."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsparse._findings import Degrees, degrees, places
from jaxsparse._picture import INK, QUIET, caption, count_cells, plot_pattern

if TYPE_CHECKING:
    from jaxsparse._matrices import Matrix
    from jaxsparse.formats import BlockPattern

_MOST = 40  # patterns of a picture; more are illegible
_CELLS = (512, 512)
_KEPT, _GONE, _GROWN = "#8a8f9c", "#d9480f", "#2b8a3e"


def save(before: Mapping[str, Matrix], after: Mapping[str, Matrix] | None, path: Path) -> None:
    """Writes the picture that `check_picture` has allowed, in the format that the name ends in."""
    drawn = {name: m.pattern for name, m in before.items() if m.pattern is not None}
    if not drawn:
        raise ValueError("there is no pattern to draw: every matrix is dense.")
    if len(drawn) > _MOST:
        print(
            f"jaxsparse: {path} has the first {_MOST} of {len(drawn)} patterns; --layers picks others", file=sys.stderr
        )
    drawn = dict(list(drawn.items())[:_MOST])
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": QUIET, "axes.edgecolor": "#c9c7c2"}):
        size = (12.5, 3.9 * len(drawn))
        figure, grid = plt.subplots(
            len(drawn), 3, figsize=size, squeeze=False, layout="constrained", width_ratios=(1.5, 1, 1)
        )
        for line, (name, pattern) in zip(grid, drawn.items(), strict=True):
            other = after[name].pattern if after is not None and name in after else None
            _draw_line(line, name, pattern, other)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_line(line: Any, name: str, pattern: BlockPattern, other: BlockPattern | None) -> None:
    title = f"{name}\n{caption(pattern)}"
    comparable = other is not None and (other.shape, other.block) == (pattern.shape, pattern.block)
    if other is not None and comparable:
        _draw_moves(line[0], pattern, other, title)
    else:
        plot_pattern(pattern, line[0], title=title)
    found = degrees(pattern)
    then = degrees(other) if other is not None and comparable else {}
    what = "entries" if pattern.is_unstructured else "blocks"
    lines = {"outputs": f"stored {what} of an output", "inputs": f"stored {what} of an input"}
    for axes, (axis, label) in zip(line[1:], lines.items(), strict=True):
        _draw_degrees(axes, found[axis], then.get(axis))
        count = pattern.grid[1 if axis == "outputs" else 0]
        unit = axis if what == "entries" else f"block {'columns' if axis == 'outputs' else 'rows'}"
        axes.set(xlabel=label, ylabel=f"{unit}, of {count}")


def _draw_degrees(axes: Any, d: Degrees, then: Degrees | None) -> None:
    axes.stairs(d.counts, np.array(d.edges) - 0.5, fill=True, color=_KEPT, label="first")
    if then is not None:
        axes.stairs(then.counts, np.array(then.edges) - 0.5, color=_GONE, linewidth=1.5, label="second")
        axes.legend(framealpha=0.85, edgecolor="none")
    ends = [edge for histogram in (d, then) if histogram for edge in (histogram.edges[0], histogram.edges[-1])]
    axes.set_xlim(min(ends) - 1.5, max(ends) + 0.5)
    empty = f", [{d.empty} empty]" if d.empty else ""
    axes.set_title(f"{d.least} to {d.most}, median {d.median:g}{empty}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_moves(axes: Any, before: BlockPattern, after: BlockPattern, title: str) -> None:
    """Grey where both store, and in colour what went and what came."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    a, b = places(before), places(after)
    parts = {_KEPT: np.intersect1d(a, b), _GONE: np.setdiff1d(a, b), _GROWN: np.setdiff1d(b, a)}
    shares = {c: count_cells(*np.divmod(at, before.grid[1]), before.grid, _CELLS) for c, at in parts.items()}
    darkest = max(np.sum(list(shares.values()), axis=0).max(), 1e-9)
    ink = np.sum([share[..., None] / darkest * (1 - np.array(to_rgb(c))) for c, share in shares.items()], axis=0)
    (rows, cols), (i, o) = before.grid, before.block
    axes.imshow(1 - np.clip(ink, 0, 1), extent=(0, cols * o, rows * i, 0), interpolation="nearest")
    axes.set(xlim=(0, before.shape[1]), ylim=(before.shape[0], 0), xlabel="output feature", ylabel="input feature")
    axes.set_aspect("equal" if max(before.shape) <= 4 * min(before.shape) else "auto")
    axes.set_title(title, fontsize=10)
    axes.locator_params(integer=True)
    names = {_KEPT: "kept", _GONE: "gone", _GROWN: "grown"}
    handles = [Patch(color=c, label=f"{names[c]} {len(at):,}") for c, at in parts.items()]
    axes.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
