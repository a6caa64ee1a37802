"""The picture: dots for whatever is compared with dense, heat maps for the two grids."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, NullFormatter

INK, QUIET, PAPER, LINE = "#22242b", "#767a85", "#ffffff", "#e6e4df"
OURS = "#e8590c"
PEERS = {
    "ours (xla)": ("#f7b267", "o"),
    "JAX dense": ("#1b4f72", "s"),
    "JAX masked": ("#5dade2", "s"),
    "JAX BCOO": ("#76448a", "D"),
    "JAX BCSR": ("#bb8fce", "D"),
    "torch dense": ("#145a32", "^"),
    "torch masked": ("#58d68d", "^"),
    "torch CSR": ("#7d6608", "v"),
    "SparseLab": ("#c0392b", "P"),
}
DOTS = ("unstructured", "small batch", "large batch", "first call")


def draw(run: dict, path: Path) -> Path:
    """Writes the PNG; a family that did not run leaves its place empty."""
    ours, machine = run["judged"], run["machine"]
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": QUIET}):
        figure = plt.figure(figsize=(16, 15.5), facecolor=PAPER)
        grid = figure.add_gridspec(
            2, 1, height_ratios=(1.35, 1), left=0.29, right=0.95, top=0.89, bottom=0.05, hspace=0.16
        )
        figure.text(0.02, 0.965, "Sparse layers on a CPU, against what else one could pick", fontsize=21, weight="bold")
        versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if n in ("jax", "torch", "sparselab"))
        figure.text(
            0.02,
            0.945,
            f"{machine['cpu']}, {machine['cores']} cores, {machine['kernels']}, float32; {versions}; "
            f"{machine['date'][:10]}. Training: forward, both gradients, optimizer.",
            color=QUIET,
        )
        _draw_dots(figure.add_subplot(grid[0]), run, ours)
        lower = figure.add_gridspec(
            2,
            3,
            width_ratios=(1.1, 1.7, 1.7),
            left=0.06,
            right=0.985,
            top=0.385,
            bottom=0.04,
            wspace=0.2,
            hspace=0.42,
        )
        for row, mode in enumerate(("training", "forward")):
            _draw_blocks(figure.add_subplot(lower[row, 0]), run, mode)
        for column, mode in enumerate(("training", "forward"), 1):
            _draw_diagonal(figure.add_subplot(lower[:, column]), run, mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path


def _draw_dots(axes, run: dict, ours: str) -> None:
    """A line for each cell; to the right is faster than the faster of the two dense products."""
    cells = [cell for cell in run["cells"] if cell["family"] in DOTS]
    axes.set_title(
        "Speed relative to dense (the faster of JAX and torch)", loc="left", fontsize=13, weight="bold", pad=26
    )
    for y, cell in enumerate(cells):
        timed = {name: r["ms"] for name, r in cell["results"].items() if r["ms"] is not None}
        dense = [timed[name] for name in ("JAX dense", "torch dense") if name in timed]
        if not dense:
            continue
        axes.axhline(y, color=LINE, linewidth=0.8, zorder=0)
        speeds = {name: min(dense) / ms for name, ms in timed.items()}
        for name, (color, marker) in PEERS.items():
            if name in speeds and name != ours:
                axes.plot(speeds[name], y, marker, color=color, markersize=6.5, markeredgecolor=PAPER, zorder=2)
        if ours in speeds:
            axes.plot(speeds[ours], y, "o", color=OURS, markersize=12, markeredgecolor=PAPER, zorder=3)
            beside = axes.get_yaxis_transform()  # in a column of their own, where no marker is
            axes.text(1.01, y, f"{speeds[ours]:.1f}x", color=OURS, weight="bold", va="center", transform=beside)
        _draw_goals(axes, y, _goal_of(run, cell))
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(cells)), [f"{_prefix(cell)}{cell['label']}" for cell in cells])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    quiet(axes)
    handles = [plt.Line2D([], [], marker="o", color=OURS, linestyle="", markersize=10, label=ours)]
    for name, (color, marker) in PEERS.items():
        handles.append(plt.Line2D([], [], marker=marker, color=color, linestyle="", label=name))
    handles.append(
        plt.Line2D([], [], marker="|", color=INK, linestyle="", markersize=10, label="target: at least, aim")
    )
    axes.legend(handles=handles, ncols=len(handles), frameon=False, loc="lower left", bbox_to_anchor=(-0.41, 1.0),
                columnspacing=1.2, handletextpad=0.2)  # fmt: skip


def _goal_of(run: dict, cell: dict) -> dict:
    """The targets against dense of this cell: its first line."""
    mine = (ln for ln in run["judgements"] if (ln["family"], ln["workload"]) == (cell["family"], cell["label"]))
    return next(mine, {})


def _draw_goals(axes, y: int, goals: dict) -> None:
    for name in ("at_least", "aim"):
        if goals.get(name):
            axes.plot(
                [goals[name]] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=1.6 if name == "at_least" else 0.8, zorder=1
            )


def _prefix(cell: dict) -> str:
    return "first call: " if cell["family"] == "first call" else ""


def _draw_blocks(axes, run: dict, mode: str) -> None:
    """Useful FLOP rate as a percentage of the dense product's."""
    cells = [c for c in run["cells"] if c["family"] == "blocks" and c["mode"] == mode]
    title = f"Blocks, {mode}: FLOP rate,\n% of the dense product's"
    table = {(c["block"][0], c["density"]): _ratio_of(run, c) for c in cells}
    heat(
        axes,
        table,
        title,
        "block",
        "density",
        lambda v: f"{100 * v:.0f}",
        lambda d: f"{d:.0%}",
        "RdYlGn",
        (0.2, 0.75, 1.1),
    )


def _draw_diagonal(axes, run: dict, mode: str) -> None:
    cells = [c for c in run["cells"] if c["family"] == "block-diagonal" and c["mode"] == mode]
    title = f"Block-diagonal, {mode}: speed relative to\nthe best of all alternatives in each cell"
    table = {(c["block"][0], c["num_blocks"]): _ratio_of(run, c) for c in cells}
    heat(axes, table, title, "F: block size", "M: number of blocks", lambda v: f"{v:.2f}", str, "RdYlGn", (0.4, 1, 3))


def _ratio_of(run: dict, cell: dict) -> float | None:
    return _goal_of(run, cell).get("ratio")


def heat(axes, table: dict, title: str, rows: str, columns: str, text, column_text, colors: str, scale) -> None:
    """A table of numbers, {(row, column): value}, in colours; `scale` is (worst, neutral, best)."""
    axes.set_title(title, loc="left", fontsize=12, weight="bold")
    if not table:
        axes.set_axis_off()
        axes.text(0, 0.5, "not run", color=QUIET)
        return
    ys, xs = (sorted({key[axis] for key in table}) for axis in (0, 1))
    values = np.array([[table.get((y, x)) or np.nan for x in xs] for y in ys], float)
    low, middle, high = scale
    logs = TwoSlopeNorm(np.log(middle), np.log(low), np.log(high))
    cmap = matplotlib.colormaps[colors].copy()
    cmap.set_bad("#efeeea")
    axes.imshow(np.log(values), cmap=cmap, norm=logs, aspect="auto", alpha=0.8)
    for (row, column), value in np.ndenumerate(values):
        missing = np.isnan(value)
        label = "-" if missing else text(value)
        axes.text(column, row, label, ha="center", va="center", fontsize=11.5, color=QUIET if missing else INK)
    axes.set_xticks(range(len(xs)), [column_text(x) for x in xs])
    axes.set_yticks(range(len(ys)), ys)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    quiet(axes)


def quiet(axes) -> None:
    """No frame, no ticks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=INK)
