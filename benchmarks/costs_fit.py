"""Fits the cost model to measured layers, and judges it by them and by others: python benchmarks/costs_fit.py.

Fitted on benchmarks/results/costs.json: jaxsparse/costs/fitted.json. Judged by that, by the same cells on another
instruction set, and by results of the other benchmarks, which nothing was fitted to (`_costs_cells.py`). Without
--write the judgement is of the factors as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import _costs_cells, _costs_figure
from benchmarks._costs_cells import Cell
from jaxsparse.costs import model

KNOTS = {"dense": ("rows", [1, 8]), "block_diag": ("side", [16, 64, 256])}
KNOTS |= {"block_sparse": ("side", [8, 16, 32, 128]), "sparse": ("rows", [1, 8, 64])}
NEARLY_ALWAYS = 0.98  # how often advice must be right where it is given
ROUNDS = 30  # of the fit, which gives cells far off less weight each time
USUAL, PULL = (1.0, 1.0, 1.0, 1.0, 0.0), 0.1  # what factors are drawn to, where few cells tell, and how much


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="fit, and write the factors into the package")
    parser.add_argument("--results", default="benchmarks/results", help="the folder of the measured cells")
    parser.add_argument("--picture", default="docs/images/costs.png")
    args = parser.parse_args()
    sets = _costs_cells.read(Path(args.results))
    if args.write:
        fitted = fit(sets[_costs_cells.FITTED_ON])
        fitted["margin"] = 1.0
        _write(fitted)
        fitted["margin"] = margin(sets[_costs_cells.FITTED_ON])
        _write(fitted)
    for name, cells in sets.items():
        print(judged(name, cells))
    print(f"picture: {_costs_figure.draw(sets, Path(args.picture))}")


def _write(fitted: dict) -> None:
    model.TABLE.write_text(json.dumps(fitted, indent=1) + "\n")
    model._table.cache_clear()


def fit(cells: Sequence[Cell]) -> dict:
    """{framework: {kind: {"axis", "knots", mode: factors, "dtypes"}}}"""
    found: dict = {}
    for framework in sorted({cell.profile.framework for cell in cells}):
        found[framework] = {}
        for kind, (axis, knots) in KNOTS.items():
            ours = [cell for cell in cells if (cell.profile.framework, cell.layer.kind) == (framework, kind)]
            fits = {mode: _factors(ours, mode, axis, knots) for mode in ("forward", "gradients")}
            found[framework][kind] = {"axis": axis, "knots": knots, **fits, "dtypes": {}}
            if kind != "dense":  # of which the profile has a rate for each
                found[framework][kind]["dtypes"] = _dtypes(ours, found[framework][kind])
    return found


def _factors(cells: Sequence[Cell], mode: str, axis: str, knots: list[float]) -> list[list[float]]:
    """The least sum of squared relative errors with factors of at least 0."""
    cells = [cell for cell in cells if cell.mode == mode and cell.layer.dtype == "float32"]
    rows = [
        np.outer(model.shares(knots, model.place(cell.layer, axis)), model.terms(cell.layer, cell.profile, mode))
        for cell in cells
    ]
    a = np.array([row.ravel() / (cell.ms / 1e3) for row, cell in zip(rows, cells, strict=True)])
    pull, usual = PULL * np.eye(a.shape[1]), PULL * np.tile(USUAL, len(knots))
    weights = np.ones(len(cells))
    for _ in range(ROUNDS):
        factors, _residual = nnls(np.vstack([a * weights[:, None], pull]), np.hstack([weights, usual]))
        error = np.abs(np.log(np.maximum(a @ factors, 1e-9)))
        weights = 1 / np.maximum(1, error / 0.1) ** 0.5 / np.maximum(a @ factors, 0.1) ** 0.5
    return [[float(f"{f:.4g}") for f in row] for row in factors.reshape(len(knots), -1)]


def _dtypes(cells: Sequence[Cell], fitted: dict) -> dict[str, float]:
    """How many times as long as predicted all but the call takes in other dtypes."""
    ratios: dict[str, list[float]] = {}
    for cell in cells:
        if cell.layer.dtype != "float32":
            parts = model.terms(cell.layer, cell.profile, cell.mode)
            factors = model._between(fitted["knots"], fitted[cell.mode], model.place(cell.layer, fitted["axis"]))
            call, *rest = (c * t for c, t in zip(factors, parts, strict=True))
            ratios.setdefault(cell.layer.dtype, []).append(max(cell.ms / 1e3 - call, 1e-6) / sum(rest))
    return {dtype: float(f"{np.exp(np.median(np.log(r))):.3g}") for dtype, r in ratios.items()}


def margin(cells: Sequence[Cell]) -> float:
    """The least factor of 1.05, 1.1, ... outside of which predicted ratios to dense are on the right side of 1, nearly
    always."""
    sparse = [cell for cell in cells if cell.layer.kind != "dense"]
    for step in range(1, 40):
        factor = 1 + 0.05 * step
        told = [cell for cell in sparse if not 1 / factor < cell.predicted_ratio < factor]
        if sum((cell.ratio > 1) == (cell.predicted_ratio > 1) for cell in told) >= NEARLY_ALWAYS * len(told):
            break
    return round(factor, 2)


def judged(name: str, cells: Sequence[Cell]) -> str:
    """How right the advice is, and how far off the times are."""
    sparse = [cell for cell in cells if cell.layer.kind != "dense"]
    clear = [cell for cell in sparse if cell.is_clear]
    right = sum((cell.ratio > 1) == (cell.predicted_ratio > 1) for cell in clear)
    off = [abs(math.log(cell.predicted_ms / cell.ms)) for cell in cells if cell.ms]
    half, most = (math.exp(np.quantile(off or [0], q)) for q in (0.5, 0.9))
    times = f"; half of the times within {half:.2f}x, nine of ten within {most:.2f}x" if off else ""
    return (
        f"{name}: {right} of {len(clear)} clear cells right, {100 * right / len(clear):.1f} %; "
        f"{len(sparse) - len(clear)} are close{times}"
    )


if __name__ == "__main__":
    main()
