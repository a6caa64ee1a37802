"""Tables as plain text: what a table of ours prints in Python, where no terminal says how wide it is."""

from __future__ import annotations

import io
from typing import Any

WIDTH = 120


def as_text(*tables: Any) -> str:
    """What rich draws, without colours, `WIDTH` columns wide."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, legacy_windows=False)
    for table in tables:
        console.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def in_bytes(size: float) -> str:
    """A size that a person reads: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
