"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def amount(number: float, unit: str) -> str:
    """Three digits and a prefix of thousands: 67.1 MB."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or prefix == "E":
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError


def milliseconds(number: float) -> str:
    """Three digits, in microseconds, milliseconds or seconds."""
    if number < 0.1:
        return f"{1e3 * number:.3g} us"
    return f"{number:.3g} ms" if number < 999.5 else f"{plain(number / 1e3, 3)} s"


def plain(number: float, digits: int) -> str:
    """So many digits that count, and no exponent: 34,100."""
    rounded = float(f"{number:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10**digits else f"{rounded:.{digits}g}"


def table(lines: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns side by side, the first to the left, numbers to the right; closer together where they need the room."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    pad = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    gap = " " * (2 if sum(widths) + 2 * len(widths) - 2 <= width else 1)
    return [gap.join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in lines]
