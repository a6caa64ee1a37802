"""The arguments, progress, tables and picture of `jaxsparse bench`."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsparse.bench.grid import Cell
    from jaxsparse.bench.running import Measured

_COLORS = {
    "jaxsparse": "#e8590c",
    "jaxsparse, torch": "#f59f00",
    "JAX dense": "#1b4f72",
    "JAX masked": "#5dade2",
    "JAX BCOO": "#76448a",
    "torch dense": "#145a32",
    "torch masked": "#58d68d",
    "torch CSR": "#7d6608",
    "torch BSR": "#7d6608",
    "JAX einsum": "#76448a",
    "torch loop of Linear": "#c0392b",
    "torch bmm": "#7d6608",
    "torch einsum": "#17a589",
    "torch grouped conv1d": "#839192",
    "SparseLab": "#c0392b",
}
NAMES = ", ".join(_COLORS)


def whole(option: str, text: str) -> list[int]:
    """The numbers of an option."""
    return _numbers(option, text, int, "whole numbers")


def shares(option: str, text: str) -> list[float]:
    return _numbers(option, text, float, "numbers")


def _numbers(option: str, text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ValueError(f"{option} takes {what} with commas between, got {text!r}.") from None


def about() -> dict[str, Any]:
    """What a run ran on, and with."""
    from jaxsparse import devices

    found = devices()
    default = next(p for p in found.platforms if p.default)
    machine = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": default.name,
        "device": ", ".join(default.kinds),
        "kernels": found.library.isa,
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join(["jaxsparse", *sys.argv[1:]])
    return {"command": command, "date": now, "machine": machine, "versions": found.versions}


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[Callable[[], None]]:
    """What raises KeyboardInterrupt where one was asked for: raised within a callback, one may be lost."""
    asked, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ask(*_) -> None:
        asked.set()
        raise KeyboardInterrupt

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def run_with_progress(
    cells: Sequence[Cell], seconds: float, only: str, keep: Callable[[list[Measured]], Any]
) -> list[Measured]:
    """Runs the grid, with a bar on stderr where that is a terminal. An interrupt ends it; what is done comes back."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from jaxsparse.bench import running

    console = Console(stderr=True)
    columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    done: list[Measured] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=len(cells))

        def tell(what: str) -> None:
            cell = cells[min(len(done), len(cells) - 1)]
            bar.update(task, description=f"{cell.size_in}x{cell.size_out}, {cell.density:g}: {what}")

        try:
            with _no_interrupt_lost() as check:
                for measured in running.run(cells, seconds, only, tell):
                    done.append(measured)
                    keep(done)
                    bar.advance(task)
                    check()
        except KeyboardInterrupt:
            pass
    if len(done) < len(cells):
        kept = f"after {len(done)} of {len(cells)} cells, which are kept" if done else "before the first cell was done"
        print(f"jaxsparse: interrupted {kept}.", file=sys.stderr)
    return done


def tables(measured: Sequence[Measured], about: dict[str, Any]) -> Iterator[Any]:
    """A table for all cells that differ in their density alone: a line for each contender."""
    from rich.table import Table

    for _, group in _groups(measured):
        yield f"[bold]{group[0].cell.describe()}[/bold]"
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        for m in group:
            what = f"x{m.cell.diagonal}, {m.cell.density:.4g} kept" if m.cell.diagonal else f"{m.cell.density:.4g} kept"
            table.add_column(what, justify="right")
        for name in dict.fromkeys(name for m in group for name in m.results):
            table.add_row(name, *[_shown(m, name) for m in group], style="bold" if name == "jaxsparse" else "")
        yield table
        yield from _notes(group)
        yield ""
    if not measured:
        return
    machine = about["machine"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']}. Milliseconds of a call, and its speed "
        "relative to the faster of the dense ones; ~: the quartiles of the turns are more than a fifth apart."
    )
    load, cores = (machine["load_before"] or [0])[0], machine["cores"]
    if load > cores / 2:
        yield f"[red]The machine was busy: a load of {load:.1f} on {cores} cores before the run. Expect noise.[/red]"


def draw(measured: Sequence[Measured], about: dict[str, Any], path: Path) -> None:
    """Writes the picture, which `check_picture` has allowed: speed over density, a plot for each table."""
    import matplotlib.pyplot as plt

    groups = [group for _, group in _groups(measured)]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7.2 * columns, 4.6 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axes, group in itertools.zip_longest(grid.flat, groups):
        if group is None:
            axes.set_axis_off()
        else:
            _draw_group(axes, group)
    machine = about["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']}; {about['date'][:10]}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_group(axes: Any, group: list[Measured]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    kept = sorted({m.cell.density for m in group})
    axes.plot([100 * d for d in kept], [1 / d for d in kept], "--", color="#adb5bd", label="ideal: 1 / density")
    for name in dict.fromkeys(name for m in group for name in m.results):
        points = sorted((100 * m.cell.density, m.speed(name)) for m in group if m.speed(name))
        if points:
            ours = name.startswith("jaxsparse")
            style = {"linewidth": 2.5 if ours else 1.3, "markersize": 7 if ours else 4, "zorder": 3 if ours else 2}
            axes.plot(*zip(*points, strict=True), "o-", color=_COLORS.get(name), label=name, **style)
    axes.axhline(1, color="#22242b", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="weights kept, %", ylabel="times as fast as the faster dense product")
    axes.set_title(group[0].cell.describe(), fontsize=10, loc="left")
    axes.set_xticks([100 * d for d in kept])
    for axis, unit in ((axes.xaxis, ""), (axes.yaxis, "x")):
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: f"{value:g}{unit}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e9e7e2")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _groups(measured: Sequence[Measured]) -> Iterator[tuple[Any, list[Measured]]]:
    for key, group in itertools.groupby(measured, key=lambda m: m.cell.group):
        yield key, list(group)


def _shown(m: Measured, name: str) -> str:
    result = m.results.get(name)
    if result is None or result.ms is None or result.low is None or result.high is None:
        return "-"
    about = "~" if result.high - result.low > 0.2 * result.ms else ""
    speed = m.speed(name)
    if not speed:
        return f"{about}{result.ms:.3g}"
    return f"{about}{result.ms:.3g}  [green]{f'{speed:.2f}' if speed >= 0.1 else f'{speed:.1g}'}x[/green]"


def _notes(group: list[Measured]) -> Iterator[Any]:
    """Why a contender has no number, once for all densities."""
    from rich.text import Text

    notes = {(name, r.note): None for m in group for name, r in m.results.items() if r.note}
    yield from (Text(f"{name}: {note}", style="dim") for name, note in notes)
