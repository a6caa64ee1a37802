"""The tables and pictures of `jaxsparse show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsparse._findings import Degrees, Moved
    from jaxsparse._matrices import Matrix
    from jaxsparse.formats import BlockPattern

    Matrices = Mapping[str, Matrix]

_WIDE, _HIGH = 36, 18  # characters of a picture
_BARS = " ▁▂▃▄▅▆▇█"


def differences(before: Matrices, after: Matrices) -> dict[str, Moved]:
    """What moved, by path; layers of one of the two alone have a note."""
    from jaxsparse._findings import Moved, difference

    moved = {}
    for name in dict.fromkeys([*before, *after]):
        if name in before and name in after:
            moved[name] = difference(before[name], after[name])
        else:
            moved[name] = Moved(note="only in the first" if name in before else "only in the second")
    return moved


def table(matrices: Matrices) -> Any:
    """A line for each matrix."""
    from rich.markup import escape

    from jaxsparse._findings import degrees

    result = _table(
        "layer", "stored", "shape", "block", "density", "empty\nin", "empty\nout", "per\noutput", "per\ninput"
    )
    for name, m in matrices.items():
        line = [escape(name), m.stored, "{}x{}".format(*m.shape)]
        if m.pattern is None:
            result.add_row(*line, "", f"{m.density:.3g}", "", "", "", "")
            continue
        found = degrees(m.pattern)
        empty = [f"[red]{d.empty}[/red]" if d.empty else "0" for d in found.values()]
        spread = [_spread(found[axis]) for axis in ("outputs", "inputs")]
        result.add_row(*line, "{}x{}".format(*m.pattern.block), f"{m.density:.3g}", *empty, *spread)
    result.caption = "per output, per input: least/median/most stored blocks (or entries) of a line"
    result.caption_justify = "left"
    return result


def moves(before: Matrices, after: Matrices, moved: Mapping[str, Moved]) -> Any:
    """A line for each matrix of two checkpoints."""
    from rich.markup import escape

    result = _table("layer", "density", "then", "kept", "gone", "grown", "moved", "values\nchanged", "note")
    for name, m in moved.items():
        densities = [f"{side[name].density:.3g}" if name in side else "" for side in (before, after)]
        counts = ["" if n is None else f"{n:,}" for n in (m.kept, m.gone, m.grown)]
        share = "" if m.gone is None or m.kept is None else f"{m.gone / max(m.kept + m.gone, 1):.1%}"
        change = "" if m.change is None else f"{m.change:.2%}"
        result.add_row(escape(name), *densities, *counts, share, change, escape(m.note))
    result.caption = (
        "moved: gone, of what was stored; values changed: of what both store, L2 norm relative to the first"
    )
    result.caption_justify = "left"
    return result


def pictures(
    before: Matrices, most: int, after: Matrices | None = None, moved: Mapping[str, Moved] | None = None
) -> Iterator[Any]:
    """Characters for the first patterns, as many side by side as fit; of two checkpoints first for what moved."""
    from rich.columns import Columns
    from rich.text import Text

    drawn = {name: m.pattern for name, m in before.items() if m.pattern is not None}
    if moved:
        drawn = dict(sorted(drawn.items(), key=lambda item: not moved[item[0]].is_change))
    panels = []
    for name, pattern in list(drawn.items())[:most]:
        other = after[name].pattern if after is not None and name in after else None
        panels.append(_panel(name, pattern))
        if other is not None:
            panels.append(_panel(f"{name}, then", other))
    if panels:
        yield ""
        yield Columns(panels, padding=(1, 3))
        yield Text(
            "Inputs from top to bottom, outputs from left to right; the darker, the more is stored.", style="dim"
        )
    if len(drawn) > most:
        yield Text(f"Not drawn: {len(drawn) - most} of {len(drawn)} patterns (--pictures, --png).", style="dim")


def save(before: Matrices, after: Matrices | None, path: Path) -> None:
    """Writes the pictures of all patterns to a file."""
    from jaxsparse.cli import _show_plot

    _show_plot.save(before, after, path)


def _panel(name: str, pattern: BlockPattern) -> Any:
    from rich.text import Text

    from jaxsparse._findings import degrees
    from jaxsparse._picture import caption

    text = Text(no_wrap=True)
    text.append(f"{name}\n", "bold")
    text.append(f"{caption(pattern)}\n", "dim")
    text.append("".join(f"│{line}│\n" for line in _drawn(pattern)))
    for axis, d in degrees(pattern).items():
        text.append(f"per {axis[:-1]:<6} ", "dim")
        text.append(f"{d.least} {_bars(d)} {d.most}\n")
    return text


def _drawn(pattern: BlockPattern) -> list[str]:
    """Lines of characters, each twice as high as it is wide, in the proportions of the matrix."""
    from jaxsparse._picture import as_lines

    rows, cols = pattern.grid
    if rows <= _HIGH and cols <= _WIDE // 2:  # a block is two characters
        return ["".join(2 * c for c in line) for line in as_lines(pattern, (_HIGH, _WIDE))]
    high, wide = (size / max(pattern.shape) for size in pattern.shape)
    return as_lines(pattern, (max(4, round(_HIGH * high)), max(8, round(_WIDE * wide))))


def _bars(d: Degrees) -> str:
    """The histogram of a line's degrees, the number of lines as the height."""
    top = max(d.counts)
    return "".join(_BARS[-(-n * (len(_BARS) - 1) // top)] for n in d.counts)


def _spread(d: Degrees) -> str:
    return f"{d.least}/{d.median:g}/{d.most}"


def _table(*names: str) -> Any:
    from rich.table import Table

    result = Table(box=None, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False, header_style="dim")
    for k, name in enumerate(names):
        words = name in ("layer", "stored", "shape", "block", "note")
        folds: dict[str, Any] = {"overflow": "fold", "min_width": 12} if k == 0 else {"no_wrap": name != "note"}
        result.add_column(name, justify="left" if words else "right", **folds)
    return result
