"""How commands print: JSON, or tables as wide as the terminal."""

import json
import os
import sys
from typing import Any

PIPED = 120  # columns, where nothing says how many there are


def show_json(value: Any) -> None:
    """Prints JSON, and nothing else, to stdout."""
    print(json.dumps(value, indent=2, default=str, allow_nan=False))


def show(*renderables: Any) -> None:
    """Prints what rich draws; without colours where stdout is no terminal."""
    from rich.console import Console

    if "utf" not in (sys.stdout.encoding or "").lower():
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, width=PIPED if unknown else None)
    for renderable in renderables:
        console.print(renderable)
