"""Tables of what `gpu.py` measured, beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import _gpu_cells
from pallas_kernels.triton.crossover import HALF


def tables(run: Mapping[str, Any]) -> str:
    """In Markdown: the machine, its ceilings, every cell with predicted and measured times, and what failed."""
    machine, steps = run.get("machine", {}), run["steps"]
    lines = [f"{machine.get('gpu', 'no machine')}, jax {machine.get('jax', '?')}, {machine.get('date', '?')}"]
    if run.get("dry_run"):
        lines.append("A rehearsal: the numbers mean nothing.")
    if "ms" in (ceilings := steps.get("ceilings", {})):
        lines.append(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items() if name != "ms"))
    head = (
        "| workload | predicted limit, us | ours, us | of the limit | useful share of the peak | wins "
        "| times as fast as XLA | as the best other |"
    )
    rows = [row for cell in _gpu_cells.grid(bool(run.get("dry_run"))) for row in _row(cell, steps)]
    lines += ["", head, "| --- |" + " --- |" * 7, *rows, ""]
    failed = [f"- {name}: {result['error'][:200]}" for name, result in steps.items() if "error" in result]
    failed += [
        f"- {name}, {contender}: {note[:200]}"
        for name, result in steps.items()
        for contender, note in result.get("notes", {}).items()
    ]
    skipped = [f"- {name}: {result['skipped']}" for name, result in steps.items() if "skipped" in result]
    for title, found in (("Tuned", _tuned(steps)), ("Beside", _said(steps)), ("Failed", failed), ("Not run", skipped)):
        lines += [f"{title}:", *found, ""] if found else []
    return "\n".join(lines)


def least_of_ours(limits: Mapping[str, float]) -> float | None:
    """The least milliseconds that are predicted for any of our kernels."""
    return min((ms for name, ms in limits.items() if name.startswith("ours")), default=None)


def _row(cell: _gpu_cells.Cell, steps: Mapping[str, Any]) -> Iterator[str]:
    result = steps.get(f"time {cell.name}", {})
    ms = result.get("ms", {})
    ours = {name: t for name, t in ms.items() if name.startswith("ours") and "chosen" not in name and "xla" not in name}
    others = {name: t for name, t in ms.items() if not name.startswith("ours")}
    if not ms:
        return
    limit, best = least_of_ours(result["predicted_limit_ms"]), min(ours.values(), default=None)
    named = {name: t for name, t in ms.items() if "chosen" not in name}
    cells = [
        cell.name,
        f"{1e3 * limit:.3g}" if limit else "",
        f"{1e3 * best:.3g}" if best else "",
        f"{limit / best:.0%}" if limit and best else "",
        f"{_useful(cell) / (1e-3 * best * HALF):.0%}" if best else "",
        min(named, key=named.__getitem__),
        f"{ms['ours (xla)'] / best:.2f}" if best and "ours (xla)" in ms else "",
        f"{min(others.values()) / best:.2f}" if best and others else "",
    ]
    yield f"| {' | '.join(cells)} |"


def _useful(cell: _gpu_cells.Cell) -> float:
    """Operations of one layer, on what is stored."""
    products = 3 if cell.mode == "step" else 1
    return 2 * cell.batch * cell.density * cell.shape[0] * cell.shape[1] * products


def _tuned(steps: Mapping[str, Any]) -> list[str]:
    """The best configurations, beside what is taken where none was measured."""
    found = {name.removeprefix("tune "): result for name, result in steps.items() if "best" in result}
    gains = {name: next(iter(r["ms"].values())) / r["ms"][r["best"]] for name, r in found.items()}
    return [f"- {name}: {r['best']}, {gains[name]:.2f}x the first" for name, r in found.items()]


def _said(steps: Mapping[str, Any]) -> list[str]:
    """The last lines of what the commands beside the steps said, and all that the profiler counted."""
    lines = {name: r["ok"].strip().splitlines() for name, r in steps.items() if isinstance(r.get("ok"), str)}
    return [
        f"- {name}: {line}"
        for name, found in lines.items()
        for line in found[0 if name.startswith("counters") else -2 :]
    ]
