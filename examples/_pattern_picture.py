"""The picture of moving_patterns.py: how many connections every pixel of the input has, as training goes on."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, QUIET = "#22242b", "#767a85"
COLORS = {"static": "#4a4e59", "SET": "#0c8599", "RigL": "#e8590c"}
MOMENTS = 5


def draw(runs: dict[str, tuple[list[np.ndarray], list[float]]], sparsity: float, path: str) -> None:
    """Writes a PNG. `runs` gives, by method, the connections of every input and the accuracy, both by time."""
    with plt.rc_context({"font.size": 10.5, "text.color": INK, "axes.labelcolor": QUIET}):
        figure = plt.figure(figsize=(13, 6.3))
        figure.text(0.06, 0.935, "Where the first layer looks", fontsize=20, weight="bold")
        subtitle = f"connections of every pixel to the first hidden layer, {sparsity:.0%} of all weights are zero"
        figure.text(0.06, 0.895, subtitle, color=QUIET)
        grid = figure.add_gridspec(len(runs), MOMENTS, left=0.06, right=0.62, top=0.835, bottom=0.05, hspace=0.08)
        top = np.percentile([counts[-1] for counts, _ in runs.values()], 99)
        for line, (name, (counts, _)) in enumerate(runs.items()):
            for column, k in enumerate(np.linspace(0, len(counts) - 1, MOMENTS).round().astype(int)):
                axes = figure.add_subplot(grid[line, column])
                side = int(np.sqrt(len(counts[k])))
                image = axes.imshow(counts[k].reshape(side, side), cmap="magma_r", vmin=0, vmax=top)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color="#c9c7c2")
                if line == 0:
                    axes.set_title(f"{k / (len(counts) - 1):.0%} of training", color=QUIET, fontsize=10)
                if column == 0:
                    axes.set_ylabel(name, color=COLORS[name], fontsize=14, weight="bold")
        bar = figure.colorbar(image, cax=figure.add_axes((0.632, 0.05, 0.01, 0.245)), extend="max")
        bar.outline.set_visible(False)
        bar.set_label("connections")
        _draw_accuracies(figure.add_axes((0.735, 0.09, 0.245, 0.745)), runs)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_accuracies(axes, runs) -> None:
    for name, (_, accuracies) in runs.items():
        done = np.linspace(0, 1, len(accuracies) + 1)[1:]
        axes.plot(100 * done, 100 * np.asarray(accuracies), color=COLORS[name], linewidth=2, label=name)
    late = [a for _, accuracies in runs.values() for a in accuracies[len(accuracies) // 6 :]]
    axes.set_ylim(100 * min(late) - 0.3, 100 * max(late) + 0.3)
    axes.set_title("Test accuracy, %", loc="left", fontsize=13, weight="bold")
    axes.set_xlabel("% of training")
    axes.grid(axis="y", color="#e9e7e2")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=QUIET)
    axes.legend(frameon=False, loc="lower right")
