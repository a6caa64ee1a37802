"""The printed report: the machine, a table of milliseconds for each family, the targets and what came of them."""

from __future__ import annotations

import itertools
import sys
import time


def heading(run: dict) -> str:
    machine, limits = run["machine"], run["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, our kernels: {machine['kernels']}, "
        f"torch: {machine['torch_isa']}, {machine['torch_threads']} threads\n"
        f"Python {machine['python']}, {versions}\n"
        f"dense product: JAX {limits['jax_dense_gflops']:.0f} GFLOP/s, "
        f"torch {limits['torch_dense_gflops']:.0f} GFLOP/s; reading memory: {limits['memory_read_gb_per_s']:.0f} GB/s"
        f"{_caches(limits)}"
    )


def _caches(limits: dict) -> str:
    if "fma_gflops_per_core" not in limits:
        return "; the caches were not measured, for want of a C++ compiler"
    return (
        f"\none core: {limits['fma_gflops_per_core']:.0f} GFLOP/s from registers; loads "
        f"{limits['l1_load_gb_per_s_per_core']:.0f} GB/s from L1 and {limits['l2_load_gb_per_s_per_core']:.0f} from L2"
    )


def progress(line: str) -> None:
    """What is being measured now: on a terminal one line that overwrites itself, in a log a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def family_table(family: str, cells: list[dict]) -> str:
    """A row for each cell, a column for each contender; below, who could not and why."""
    contenders = list(dict.fromkeys(name for cell in cells for name in cell["results"]))
    marks: dict[str, str] = {}  # the reason: its mark
    rows = [["", *contenders, "others"]]
    for cell in cells:
        results = (cell["results"].get(name) for name in contenders)
        numbers = [cell["skipped"]] if "skipped" in cell else [_milliseconds(r, marks) for r in results]
        load = cell.get("load_of_others")
        rows.append([cell["label"], *numbers, "" if load is None else f"{load:.1f}"])
    unit = "ms to trace, lower and compile" if family == "first call" else "ms a call"
    lines = [f"\n== {family}: {unit}, median of the rounds; `others`: cores busy with other processes", *_columns(rows)]
    return "\n".join([*lines, *(f"  {mark} {reason}" for reason, mark in marks.items())])


def judgement_table(judgements: list[dict]) -> str:
    rows = [["", "against", "ours", "other", "ratio", "at least", "aim", "verdict"]]
    for line in judgements:
        goals = [_ratio(line[name]) for name in ("ratio", "at_least", "aim")]
        rows.append([line["workload"], line["against"], _short(line["ours_ms"]), _short(line["other_ms"]), *goals])
        rows[-1].append(line["verdict"])
    counts = {v: sum(line["verdict"] == v for line in judgements) for v in ("aim met", "met", "below target")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join(["\n== targets: ratios in our favour, median over rounds", *_columns(rows, left=2), summary])


def _milliseconds(result: dict | None, marks: dict[str, str]) -> str:
    if result is None:
        return ""
    mark = ""
    if result["note"]:
        mark = marks.setdefault(result["note"], f"[{len(marks) + 1}]")
    return _short(result["ms"]) + mark


def _short(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _columns(rows: list[list[str]], left: int = 1) -> list[str]:
    """Cells padded to their column, the first `left` to the left."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*(r for r in rows if len(r) > 3), fillvalue="")]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=False)
        lines.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return lines
