"""What became of the layers that rules took: a report, row by row and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jaxsparse.costs.racing import Race
from jaxsparse.models.rules import Left, Rule

_SELDOM_PAYS = {"sparse": 0.3, "block_sparse": 0.7}  # densities above which the layers lose to dense ones in places


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one layer. Sizes are (before, after); bytes are of parameters, and after with the pattern's.

    Attributes:
      path: the layer's dotted path.
      kind: what it became; "dense" where `only_if_faster` left it.
      before, after: both in words.
      parameters, bytes: (before, after).
      relative_error: |W - W'| / |W|, in Frobenius norms, W' being the matrix that is left; None for fresh weights.
      milliseconds: (dense, sparse) of forward and backward pass, where they were measured.
      density: the fraction of the weight that is kept; None of block-diagonal layers and where it stayed dense.
    """

    path: str
    kind: str
    before: str
    after: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    relative_error: float | None = None
    milliseconds: tuple[float, float] | None = None
    density: float | None = None

    @property
    def advice(self) -> str | None:
        """What to do about a density that was found and seldom pays (docs/performance.md says what does)."""
        if self.density is None or self.density <= _SELDOM_PAYS[self.kind]:
            return None
        may_lose = "at which it may be slower than dense: only_if_faster=True measures it."
        return f"keeps {self.density:.4g} of its weight, {may_lose}"

    @classmethod
    def of(cls, path: str, rule: Rule | None, shape: tuple[int, int], race: Race | None = None, **numbers) -> Row:
        """The row of an (in, out) layer; without a rule it stayed dense, as its race had it."""
        stayed = "dense, as a race can't tell" if race and race.faster is None else "dense, which is faster"
        kind, density = (str(rule.kind), rule.density) if rule else ("dense", None)
        if race:
            numbers["milliseconds"] = race.milliseconds
        return cls(path, kind, "{}x{}".format(*shape), rule.describe() if rule else stayed, density=density, **numbers)


class Report(Sequence):
    """The rows of all layers that a rule took, in the model's order; `print` shows them as a table.

    Attributes:
      rows: a list of `Row`.
      parameters: (before, after) of the whole model.
      left: a list of `Left`: layers that look dense and that a rule matches, but that can't be replaced.
    """

    def __init__(self, rows: Sequence[Row], parameters_before: int, left: Sequence[Left] = ()):
        self.rows, self.left = list(rows), list(left)
        saved = sum(before - after for before, after in self._pairs()[0])
        self.parameters = (parameters_before, parameters_before - saved)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        lines = [("path", "before", "after", "parameters", "MB", "error", "ms")]
        lines += [_cells(row) for row in self.rows]
        sums = [[sum(pair[i] for pair in pairs) for i in (0, 1)] for pairs in self._pairs()]
        lines.append(
            (f"{len(self)} layer{'s' * (len(self) != 1)}", "", "", _arrow(sums[0], ","), _megabytes(sums[1]), "", "")
        )
        lines.append(("whole model", "", "", _arrow(self.parameters, ","), "", "", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        keep = [i for i in range(len(widths)) if any(line[i] for line in lines[1:])]
        text = ["  ".join(line[i].ljust(widths[i]) for i in keep).rstrip() for line in lines]
        slow = [Left(row.path, row.advice) for row in self.rows if row.advice and row.milliseconds is None]
        return "\n".join([*text, *_told("slow?", slow), *_told("left", self.left)])

    __repr__ = __str__

    def _pairs(self) -> list[list[tuple[int, int]]]:
        return [[row.parameters for row in self.rows], [row.bytes for row in self.rows]]


def _told(title: str, left: Sequence[Left]) -> list[str]:
    """A line for each reason, with the first of its layers."""
    paths: dict[str, list[str]] = {}
    for one in left:
        paths.setdefault(one.reason, []).append(one.path)
    return [
        f"{title}: {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''} {reason}"
        for reason, found in paths.items()
    ]


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.relative_error is None else f"{row.relative_error:.3f}"
    ms = "" if row.milliseconds is None else _arrow(row.milliseconds, ".2f")
    return row.path, row.before, row.after, _arrow(row.parameters, ","), _megabytes(row.bytes), error, ms


def _megabytes(size: Sequence[int]) -> str:
    return _arrow([n / 1e6 for n in size], ".2f")


def _arrow(pair: Sequence[float], form: str) -> str:
    return " -> ".join(f"{number:{form}}" for number in pair)
