"""How commands print: JSON, or tables as wide as the terminal; and what a picture needs."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

PIPED = 120  # columns, where nothing says how many there are


def show_json(value: Any) -> None:
    """Prints JSON, and nothing else, to stdout."""
    print(json.dumps(value, indent=2, default=str, allow_nan=False))


def show(*renderables: Any) -> None:
    """Prints what rich draws; without colours where stdout is no terminal."""
    from rich.console import Console

    if "utf" not in (sys.stdout.encoding or "utf").lower():  # None of what holds text, as io.StringIO
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, width=PIPED if unknown else None)
    for renderable in renderables:
        console.print(renderable)


def check_expression(option: str, text: str) -> None:
    """Raises ValueError for a text that is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{option} {text!r} is no regular expression: {error}.") from None


def check_folder(path: Path | None) -> None:
    """Raises ValueError where a file could not be written for lack of its folder: before anything is computed."""
    if path and not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to.")


def check_picture(path: Path | None) -> None:
    """Raises ValueError and ImportError where a picture could not be written; chooses how matplotlib draws."""
    check_folder(path)
    if not path:
        return
    try:
        import matplotlib
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install 'jaxsparse[plots]'.") from error
    matplotlib.use("Agg")
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--png {path}: matplotlib writes files that end in .{', .'.join(sorted(known))}.")
