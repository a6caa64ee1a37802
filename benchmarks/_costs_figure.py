"""The picture of the cost model: predicted over measured times, and where its advice would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks._costs_cells import Cell
from benchmarks._figure import INK, LINE, PAPER, QUIET

KINDS = {
    "dense": ("dense", "#767a85", "s"),
    "block_diag": ("block-diagonal", "#1b4f72", "D"),
    "block_sparse": ("block-sparse", "#1e8449", "^"),
    "sparse": ("unstructured", "#e8590c", "o"),
}


def draw(sets: Mapping[str, Sequence[Cell]], path: Path) -> Path:
    """Two pictures for each set: times, and how many times as fast as dense."""
    rows = len(sets)
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 13, "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(rows, 2, figsize=(11, 4.8 * rows), facecolor=PAPER, squeeze=False)
        for (name, cells), (times, ratios) in zip(sets.items(), axes, strict=True):
            timed = [cell for cell in cells if cell.ms]
            _scatter(times, timed, [(cell.ms, cell.predicted_ms) for cell in timed], "milliseconds of a call")
            times.set_title(name, loc="left", weight="bold")
            sparse = [cell for cell in cells if cell.layer.kind != "dense"]
            _scatter(ratios, sparse, [(c.ratio, c.predicted_ratio) for c in sparse], "times as fast as dense")
            ratios.axhline(1, color=INK, linewidth=0.8)
            ratios.axvline(1, color=INK, linewidth=0.8)
            for x, y, text in ((0.02, 0.94, "wrong: dense is faster"), (0.98, 0.03, "wrong: sparse is faster")):
                ratios.text(
                    x, y, text, transform=ratios.transAxes, color=QUIET, ha="left" if x < 0.5 else "right", fontsize=11
                )
        handles = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=n) for n, c, m in KINDS.values()]
        figure.legend(handles=handles, ncols=4, frameon=False, loc="upper center")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / rows / 2))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)
        plt.close(figure)
    return path


def _scatter(axes, cells: Sequence[Cell], points: Sequence[tuple[float, float]], what: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"measured, {what}")
    axes.set_ylabel(f"predicted, {what}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    if not points:
        axes.set_axis_off()
        axes.text(0, 0.9, "only ratios are known", transform=axes.transAxes, color=QUIET)
        return
    for kind, (_, color, marker) in KINDS.items():
        mine = np.array([p for cell, p in zip(cells, points, strict=True) if cell.layer.kind == kind])
        if len(mine):
            axes.plot(mine[:, 0], mine[:, 1], marker, color=color, markersize=5, alpha=0.65, markeredgewidth=0)
    low, high = 0.7 * np.min(points), 1.4 * np.max(points)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
