"""Sizes of tiles: those measured to be best on a kind of GPU, and a heuristic for whatever was not measured."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHARED_MEMORY = 232_448 - 1024  # bytes a program may use on Hopper, less what the barriers take
MEASURED = Path(__file__).with_name("measured.json")  # {kind of GPU: {key: fields}}, written by benchmarks/gpu.py
CACHED = 2**24  # bytes of x that are worth keeping in the level-2 cache of 50 MB while blocks pass by
_ITEM = 2  # bytes of a number
_line_by_line = contextvars.ContextVar("line_by_line", default=False)


class Gather(NamedTuple):
    """Tiles of the forward product and of the input gradient."""

    tile_m: int  # rows of each multiplying warpgroup
    tile_n: int  # columns, which divide those of a block
    tile_k: int  # summed numbers of one product, which divide those of a block
    stack: int  # entries in one step: several small ones fill it
    stages: int
    band: int  # tiles (of all warpgroups of a cluster) along the batch that share x in the cache
    cluster: int  # programs along the batch that share what they load of the blocks

    @property
    def shared_memory(self) -> int:
        rows = 2 * self.tile_m
        stage = self.stack * self.tile_k * (rows + self.tile_n)
        return _ITEM * (self.stages * stage + rows * self.tile_n)


class Union(NamedTuple):
    """Tiles of the same products by the kernel whose programs hold several lines."""

    tile_m: int  # rows
    tile_n: int  # columns, which divide those of a block
    tile_k: int  # summed numbers of one product, which divide those of a block
    columns: int  # tiles side by side, an even number of whole lines
    stages: int  # of x
    w_stages: int  # of tiles of blocks, for each multiplying warpgroup
    band: int  # tiles (of a whole cluster) along the batch that share x in the cache
    cluster: int  # programs along the batch that share what they load of the blocks

    @property
    def shared_memory(self) -> int:
        x, w, y = self.tile_m * self.tile_k, self.tile_n * self.tile_k, self.tile_m * self.tile_n
        return _ITEM * (self.stages * x + 2 * self.w_stages * w + 2 * y)


class Sample(NamedTuple):
    """Tiles of the weight gradient."""

    tile_i: int
    tile_o: int
    tile_m: int  # summed rows of one product
    stages: int

    @property
    def shared_memory(self) -> int:
        return _ITEM * (self.stages * self.tile_m * (self.tile_i + 2 * self.tile_o) + 2 * self.tile_i * self.tile_o)


def for_gather(
    m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None = None, kind: str = ""
) -> Gather | Union:
    """The configuration of y [m, lines * width], summed over nnzb blocks [inner, width] of x [m, features]; where
    nnzb is None, no two lines read the same source."""
    measured = None if _line_by_line.get() else _measured(kind).get(key("gather", m, inner, width))
    return measured or next(candidates_for_gather(m, features, inner, width, lines, nnzb))


@contextlib.contextmanager
def line_by_line():
    """What is lowered inside has the kernel whose programs hold one line alone: to be compared with the other."""
    token = _line_by_line.set(True)
    try:
        yield
    finally:
        _line_by_line.reset(token)


def for_sample(m: int, i: int, o: int, nnzb: int, rows: int, kind: str = "") -> Sample:
    """The configuration of nnzb sampled blocks [i, o], in `rows` block rows, summed over m."""
    return _measured(kind).get(key("sample", m, i, o)) or next(candidates_for_sample(i, o, nnzb, rows))


def candidates_for_gather(
    m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None = None
) -> Iterator[Gather | Union]:
    """What is worth trying, the heuristic's choice first: of both kernels, the one that is predicted to load less."""
    alone = list(_line_by_line_candidates(m, features, inner, width, lines))
    together = list(_union_candidates(m, features, inner, width, lines, nnzb))
    if not together or _line_by_line.get():
        yield from alone
    elif loaded(together[0], m, features, inner, width, lines, nnzb) < loaded(
        alone[0], m, features, inner, width, lines, nnzb
    ):
        yield from (*together, *alone)
    else:
        yield from (*alone, *together)


def loaded(
    config: Gather | Union, m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None
) -> float:
    """Bytes that all programs together load into shared memory, the blocks lying at random."""
    nnzb = lines if nnzb is None else nnzb
    if isinstance(config, Gather):
        rows = 2 * config.tile_m
        tiles = -(-m // rows)
        return _ITEM * nnzb * tiles * inner * (rows * width // config.tile_n + width / config.cluster)
    sources, together = features / inner, config.columns * config.tile_n // width
    read = sources * (1 - (1 - nnzb / (lines * sources)) ** together)
    tiles, groups = -(-m // config.tile_m), -(-lines // together)
    return _ITEM * tiles * inner * (groups * read * config.tile_m + nnzb * width / config.cluster)


def _line_by_line_candidates(m: int, features: int, inner: int, width: int, lines: int) -> Iterator[Gather]:
    """Large tiles where there are enough for every program."""
    tile_n, tile_k = _divisor(width, 128), _divisor(inner, 64)
    stack = 64 // tile_k
    many = m * lines * (width // tile_n) >= 2 * 132 * 256
    for tile_m in (128, 64) if many else (64, 128):
        for cluster in (2, 1) if many and m >= 4096 and tile_n == 128 else (1, 2):
            band = max(1, CACHED // (2 * tile_m * cluster * features * _ITEM))
            yield from _deepest(Gather(tile_m, tile_n, tile_k, stack, 6, band, cluster))


def _union_candidates(m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None) -> Iterator[Union]:
    """128 x 384 sums, all that two warpgroups hold, or a third less; none where that is too little work for every
    program. Narrower tiles spill registers."""
    tile_n, tile_k = _divisor(width, 64), _divisor(inner, 64)
    if nnzb is None or tile_n < 32:
        return
    for most in (384, 256):
        columns = most // width * (width // tile_n)
        items = -(-m // 256) * -(-lines * width // most)
        if columns and columns % 2 == 0 and items >= 66:
            band = max(1, CACHED // (2 * 128 * features * _ITEM))
            yield from _deepest(Union(128, tile_n, tile_k, columns, 8, 384 // tile_n, band, 2))


def candidates_for_sample(i: int, o: int, nnzb: int, rows: int) -> Iterator[Sample]:
    """The same for the weight gradient: a row of a single piece would leave a warpgroup idle, so it gets two."""
    tile_i, tile_o = max(64, _divisor(i, 128)), _divisor(o, 128)
    if nnzb * (o // tile_o) < 1.5 * rows and tile_o >= 32:
        tile_o //= 2
    for width in (tile_o, tile_o // 2) if tile_o >= 64 else (tile_o,):
        yield from _deepest(Sample(tile_i, width, 64, 6))


def key(kernel: str, m: int, *block: int) -> str:
    """What a measurement is good for: a kernel, a block, and batches of up to the next power of two."""
    return f"{kernel} {'x'.join(map(str, block))} batch {1 << max(m - 1, 0).bit_length()}"


def _deepest(config):
    """The configuration with as many stages as shared memory holds, then one less."""
    stages = config.stages
    while config._replace(stages=stages).shared_memory > SHARED_MEMORY:
        stages -= 1
    yield from (config._replace(stages=s) for s in (stages, stages - 1) if s >= 2)


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


@functools.cache
def _measured(kind: str) -> dict[str, Any]:
    table = json.loads(MEASURED.read_text()).get(kind, {}) if MEASURED.exists() else {}
    return {name: of_fields(fields) for name, fields in table.items()}


def of_fields(fields: dict[str, int]) -> Gather | Union | Sample:
    """The configuration that has just these fields."""
    return next(kind(**fields) for kind in (Gather, Union, Sample) if set(kind._fields) == set(fields))
