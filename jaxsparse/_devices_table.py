"""How `Devices` looks in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jaxsparse._measured import FAR

if TYPE_CHECKING:
    from jaxsparse._devices import Devices, Gpu


def draw(found: Devices) -> Group:
    """Everything, a table for each kind of thing."""
    parts: list[RenderableType] = [_facts(found), "", _backends(found)]
    for gpu in found.gpus:
        parts += [
            "",
            _results(gpu) if gpu.results else f"No measurement of {escape(gpu.kind)}: XLA is the default on it.",
        ]
    return Group(*parts)


def _facts(found: Devices) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for p in found.platforms:
        table.add_row("default" if p.default else "also", escape(f"{p.name}: {p.number} x {', '.join(p.kinds)}"))
    library = found.library
    kernels = f"{library.isa or 'can not be loaded'}; {library.file}" if library.file else "not built"
    table.add_row("CPU kernels", escape(kernels))
    if library.origin:
        table.add_row("", escape(library.origin))
    if found.torch:
        table.add_row("torch, CPU", escape(found.torch.cpu))
        table.add_row("torch, GPU", escape(found.torch.cuda))
        if found.torch.remedy:
            table.add_row("", escape(found.torch.remedy))
    versions = [f"{name} {v or 'not installed'}" for name, v in found.versions.items()]
    table.add_row("versions", Columns(versions, padding=(0, 2)))  # a name and its version stay in one line
    return table


def _backends(found: Devices) -> Table:
    table = Table("back end", "runs here", "what it is", box=None, pad_edge=False, header_style="dim")
    for b in found.backends:
        lines = [f"{b.about}: {', '.join(b.dtypes)}"]
        if b.reason:
            lines += [f"[red]why not[/red]: {escape(b.reason)}"]
        if b.remedy:
            lines += [f"[green]remedy[/green]:  {escape(b.remedy)}"]
        table.add_row(f"[bold]{b.name}[/bold]", "[green]yes[/green]" if b.runs else "[red]no[/red]", "\n".join(lines))
    return table


def _results(gpu: Gpu) -> Group:
    title = (
        f"Measured on {escape(gpu.kind)}: what backend=None picks for these workloads. Another goes by the nearest of "
        f"its product and dtype, up to {FAR} doublings of rows, density and sides of blocks away; beyond, and a batch "
        "of symbolic size, to XLA."
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("product", "dtype", "block", "rows", "density", "back end", "times as fast as XLA", "run"):
        table.add_column(name, justify="left" if name in ("product", "dtype", "block", "back end", "run") else "right")
    for r in gpu.results:
        w = r.workload
        size = "{}x{}".format(*w.block)
        table.add_row(w.op, w.dtype, size, str(w.rows), f"{w.density:.3g}", r.backend, f"{r.times_as_fast:.2f}", r.run)
    return Group(title, table)
