"""What train_classifier.py shows at the end: a table, and a picture of the weights and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

INK, QUIET, PAPER, ZERO = "#22242b", "#767a85", "#ffffff", "#f4f3f0"
COLORS = {"dense": "#4a4e59", "block-diagonal": "#0c8599", "block-sparse": "#e8590c", "unstructured": "#ae3ec9"}
# magma without its ends: its palest tone must not look like a zero.
WEIGHTS = LinearSegmentedColormap.from_list("weights", matplotlib.colormaps["magma_r"](np.linspace(0.2, 0.95, 256)))
WEIGHTS.set_bad(ZERO)
ZOOM = 96


class Row(NamedTuple):
    name: str
    accuracy: float
    parameters: int
    state_bytes: int  # parameters, gradients and Adam's two moments
    pattern_bytes: int  # indices: no gradient, no moments
    ms_per_step: float


def print_table(rows: list[Row]) -> None:
    """Every number beside its ratio to the first row, which is the dense model."""
    dense = rows[0]
    print(f"\n{'':16}{'test':>9}{'':>20}{'weights, gradients,':>25}{'':>9}{'time per':>14}")
    print(f"{'':16}{'accuracy':>9}{'parameters':>13}{'':>7}{'Adam moments':>18}{'':>7}{'pattern':>9}{'step':>14}")
    for r in rows:
        print(
            f"{r.name:16}{r.accuracy:>9.1%}"
            f"{r.parameters:>13,}{r.parameters / dense.parameters:>6.2f}x"
            f"{r.state_bytes / 1e6:>15.1f} MB{r.state_bytes / dense.state_bytes:>6.2f}x"
            f"{r.pattern_bytes / 1e6:>6.2f} MB"
            f"{r.ms_per_step:>11.2f} ms{r.ms_per_step / dense.ms_per_step:>6.2f}x"
        )
    print()
    for r in rows[1:]:
        speed = dense.ms_per_step / r.ms_per_step
        slower = f"{1 / speed:.2f}x SLOWER than" if speed < 0.95 else "about as fast as"
        verdict = f"{speed:.1f}x faster than" if speed > 1.05 else slower
        memory = (r.state_bytes + r.pattern_bytes) / dense.state_bytes
        print(f"{r.name:16}a step is {verdict} dense; memory, pattern included, is {memory:.0%} of dense")


def draw(rows: list[Row], runs: dict[str, tuple[list[float], list[float], np.ndarray]], path: str) -> None:
    """Writes the PNG. `runs` gives, by name, loss and seconds of every step, and one hidden weight (in, out)."""
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK, "axes.labelcolor": INK}):
        figure = plt.figure(figsize=(13, 11.7), facecolor=PAPER)
        weights = figure.add_gridspec(2, 4, left=0.045, right=0.925, top=0.87, bottom=0.388, hspace=0.06, wspace=0.06)
        curves = figure.add_gridspec(1, 2, left=0.07, right=0.98, top=0.315, bottom=0.06, wspace=0.12)
        size = len(runs["dense"][2])
        figure.text(0.045, 0.963, "One classifier, four kinds of hidden layer", fontsize=20, weight="bold")
        figure.text(
            0.045, 0.94, f"|W| of a trained {size} x {size} layer; below, what the small frame holds", color=QUIET
        )
        for column, row in enumerate(rows):
            pair = [figure.add_subplot(weights[line, column]) for line in (0, 1)]
            image = _draw_weight(*pair, row, runs[row.name][2])
        _draw_scale(figure, image)
        _draw_losses([figure.add_subplot(curves[0, i]) for i in (0, 1)], runs)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw_weight(whole, corner, row: Row, weight: np.ndarray):
    """All of |W| above; below, single weights around the point where the first two diagonal blocks meet."""
    tones = np.ma.masked_equal(np.abs(weight), 0)
    tones /= np.percentile(tones.compressed(), 99)
    low = len(weight) // 10 - ZOOM // 2
    near = slice(max(low, 0), low + ZOOM)
    # "nearest": a pixel shows one of its weights, not their mean, so a tenth of the weights is a tenth of the dots.
    style = {"cmap": WEIGHTS, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    whole.imshow(tones, **style)
    image = corner.imshow(tones[near, near], **style)
    whole.add_patch(Rectangle((near.start, near.start), ZOOM, ZOOM, fill=False, edgecolor=INK, linewidth=1.4))
    whole.set_title(row.name, color=COLORS[row.name], fontsize=14, weight="bold", pad=24)
    note = f"{np.count_nonzero(weight):,} weights, {row.accuracy:.1%} correct"
    whole.text(0.5, 1.03, note, transform=whole.transAxes, ha="center", color=QUIET)
    for axes, edge in ((whole, "#c9c7c2"), (corner, INK)):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=edge, linewidth=1)
    return image


def _draw_scale(figure, image) -> None:
    axes = figure.add_axes((0.94, 0.388, 0.012, 0.2))
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.5, 1], extend="max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=QUIET)
    bar.set_label("|w| / 99th percentile of the layer", color=QUIET)


def _draw_losses(axes, runs) -> None:
    # By step, the sparse curves all but coincide: the later ones are thinner, so that none hides another.
    for (name, (losses, seconds, _)), width in zip(runs.items(), (2.2, 5.5, 3.4, 1.5), strict=True):
        smooth = _smooth(np.asarray(losses))
        clock = np.cumsum([0.0, *seconds[1:]])  # the first step compiles
        axes[0].plot(losses, color=COLORS[name], alpha=0.15, linewidth=0.8)
        axes[0].plot(smooth, color=COLORS[name], linewidth=width)
        axes[1].plot(clock, smooth, color=COLORS[name], linewidth=2.2, label=name)
        axes[1].plot(clock[-1], smooth[-1], "o", color=COLORS[name], markersize=7, markeredgecolor=PAPER)
    for ax, title in zip(axes, ("Training loss by step", "The same by seconds spent on training"), strict=True):
        ax.set_yscale("log")
        ax.set_title(title, loc="left", fontsize=13, weight="bold", pad=10)
        ax.grid(axis="y", color="#e9e7e2", linewidth=0.8)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color("#c9c7c2")
        ax.tick_params(which="both", length=0, labelcolor=QUIET)
        ax.margins(x=0.015)
    axes[1].legend(frameon=False, loc="best")
    axes[0].set_xlabel("step", color=QUIET)
    axes[1].set_xlabel("seconds", color=QUIET)
    axes[1].set_ylim(axes[0].get_ylim())


def _smooth(losses: np.ndarray, span: int = 11) -> np.ndarray:
    """The geometric mean over the last `span` steps."""
    logs = np.log(np.maximum(losses, 1e-12))
    return np.exp([logs[max(0, i - span + 1) : i + 1].mean() for i in range(len(logs))])
