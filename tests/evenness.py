"""Whether every place of a grid is equally likely to be drawn: one statistic for the patterns of JAX and of torch."""

# (grid, count): columns with and without one entry more, fewer entries than columns, strata that are equal and not
GRIDS = [((5, 4), 5), ((5, 8), 4), ((7, 3), 6), ((7, 3), 16), ((6, 4), 12)]


def assert_equally_likely(marked, count: int) -> None:
    """Asserts that in `marked`, bool [draws, places], no place stands out.

    How often a place is drawn is binomial if all are equally likely: over its variance, its squared deviation is 1 on
    average, however the places of one draw depend on each other. A place that is drawn a tenth too seldom at a density
    of a half adds 100 at 10,000 draws.
    """
    draws, places = marked.shape
    assert (marked.sum(1) == count).all()
    p = count / places
    squares = (marked.sum(0) - draws * p) ** 2 / (draws * p * (1 - p))
    assert squares.mean() < 3 and squares.max() < 25, f"squared deviations, in variances:\n{squares.round(1)}"
