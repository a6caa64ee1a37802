"""The picture of `torch_layers.py`: bars for whatever has a dense twin, heat maps for the block-diagonal grid."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import _figure
from benchmarks._figure import INK, OURS, PAPER, QUIET, FuncFormatter, NullFormatter, plt

APART = "block-diagonal"


def draw(families: dict, path: Path) -> Path:
    """Writes the PNG; a family that did not run leaves its place empty."""
    rows = [
        (f"{cell['label']}, {cell['mode']}{contender.removeprefix('ours')}", ratio)
        for name, family in families.items()
        if name not in (APART, "overhead")
        for cell in family["cells"]
        for contender, ratio in ratios(cell).items()
    ]
    machine = next(iter(families.values()))["machine"]
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": QUIET}):
        figure = plt.figure(figsize=(16, 5.5 + 0.24 * max(len(rows), 12)), facecolor=PAPER)
        title = "Sparse layers in PyTorch, against what one would write in torch"
        figure.suptitle(title, y=0.985, fontsize=19, weight="bold")
        figure.text(
            0.5,
            0.935,
            f"{machine['cpu']}, {machine['cores']} cores, {machine['kernels']}, float32 unless named; torch "
            f"{machine['versions']['torch']}; {machine['date'][:10]}. A step: forward, both gradients, optimizer.",
            color=QUIET,
            ha="center",
        )
        grid = figure.add_gridspec(2, 2, left=0.3, right=0.97, top=0.9, bottom=0.05, height_ratios=(2.1, 1), hspace=0.2)
        _draw_bars(figure.add_subplot(grid[0, :]), rows)
        for column, mode in enumerate(("forward", "step")):
            axes = figure.add_axes((0.06 + 0.48 * column, 0.05, 0.43, 0.22))
            _draw_diagonal(axes, families.get(APART, {"cells": []})["cells"], mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path


def ratios(cell: dict) -> dict[str, float]:
    """How many times as fast as the best alternative each of ours is."""
    times = {name: r["ms"] for name, r in cell["results"].items() if r["ms"] is not None}
    others = [ms for name, ms in times.items() if not name.startswith("ours")]
    return {name: min(others) / ms for name, ms in times.items() if name.startswith("ours") and others}


def _draw_bars(axes, rows: list[tuple[str, float]]) -> None:
    axes.set_title("Times as fast as the best alternative", loc="left", fontsize=13, weight="bold")
    for y, (_, ratio) in enumerate(rows):
        axes.barh(y, ratio - 1, left=1, color=OURS if ratio >= 1 else QUIET, height=0.7)
        axes.text(max(ratio, 1), y, f" {ratio:.2f}x", va="center", color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _figure.quiet(axes)


def _draw_diagonal(axes, cells: list[dict], mode: str) -> None:
    table = {}
    for cell in cells:
        n, features = map(int, re.findall(r"\d+", cell["label"]))
        if cell["mode"] == mode and ratios(cell):
            table[(features, n)] = ratios(cell)["ours"]
    title = f"Block-diagonal, {mode}: times as fast as\nthe best of all alternatives in each cell"
    _figure.heat(axes, table, title, "F: block size", "M: number of blocks", lambda v: f"{v:.2f}", str, "RdYlGn",
                 (0.6, 1, 2))  # fmt: skip
