"""Sweeps of which `make test` sees a part, and `make test-all` the whole."""

from collections.abc import Iterable, Sequence

import pytest


def mostly_slow(values: Iterable, keep: int = 4) -> list:
    """Parameters of a test: one in `keep`, and the others as slow ones."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (k % keep > 0)) for k, value in enumerate(values)]


def rows_mostly_slow(rows: Iterable[Sequence], keep: int = 4) -> list:
    """The same of tests with several parameters."""
    return [pytest.param(*row, marks=[pytest.mark.slow] * (k % keep > 0)) for k, row in enumerate(rows)]
