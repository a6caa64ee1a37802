"""Which back end was the fastest where, as benchmarks/gpu.py measured it: what `backend=None` goes by on a GPU."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jaxsparse._sizes import is_unstructured

TABLE = Path(__file__).with_name("measured.json")  # {kind of GPU: [fields of a Result]}
FAR = 4  # doublings of rows, density and sides of blocks, all together, over which no result speaks


class Workload(NamedTuple):
    """One product, as far as the choice of a back end depends on it.

    Attributes:
      op: "spmm", "sddmm", "spmm_grads", "block_diag_matmul" or "block_diag_outer".
      dtype: its name.
      block: (i, o), (1, 1) for single entries.
      rows: of the batch, where it is known: a batch of symbolic size has no number.
      density: the share of the matrix that is stored.
    """

    op: str
    dtype: str
    block: tuple[int, int]
    rows: Any = 1
    density: float = 1.0


class Result(NamedTuple):
    """The back end that won a workload, how many times as fast as XLA it was, and the run that says so."""

    workload: Workload
    backend: str
    times_as_fast: float
    run: str


def nearest(kind: str, work: Workload) -> Result | None:
    """The result on this kind of GPU for the workload most like this one; None where there is none near it."""
    if not isinstance(work.rows, int) or not work.rows or not work.density:
        return None
    near = [
        (_distance(work, r.workload), k) for k, r in enumerate(_results().get(kind, ())) if _alike(work, r.workload)
    ]
    least, k = min(near, default=(math.inf, -1))
    return _results()[kind][k] if least <= FAR else None


def results(kind: str) -> tuple[Result, ...]:
    """All that was measured on this kind of GPU."""
    return tuple(_results().get(kind, ()))


def write(kind: str, results: list[Result]) -> None:
    """Puts the results of a kind of GPU in the place of those that are there."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[kind] = [{**r.workload._asdict(), **{f: getattr(r, f) for f in Result._fields[1:]}} for r in results]
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    _results.cache_clear()


@functools.cache
def _results() -> dict[str, list[Result]]:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return {kind: [_result(row) for row in rows] for kind, rows in table.items()}


def _result(row: dict[str, Any]) -> Result:
    work = Workload(**{name: row[name] for name in Workload._fields})
    return Result(work._replace(block=tuple(work.block)), *(row[name] for name in Result._fields[1:]))


def _alike(work: Workload, other: Workload) -> bool:
    """Single entries and blocks have kernels of their own, and so has each dtype."""
    kinds = [(w.op, w.dtype, is_unstructured(w.block)) for w in (work, other)]
    return kinds[0] == kinds[1]


def _distance(work: Workload, other: Workload) -> float:
    sizes = [(w.rows, w.density, *w.block) for w in (work, other)]
    return sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True))
