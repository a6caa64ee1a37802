"""Sizes of tiles: those measured to be best on a kind of GPU, and a heuristic for whatever was not measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = 232_448 - 1024  # bytes a program may use on Hopper, less what the barriers take
MEASURED = Path(__file__).with_name("measured.json")  # {kind of GPU: {key: fields}}, written by benchmarks/gpu.py
CACHED = 2**24  # bytes of x that are worth keeping in the level-2 cache of 50 MB while blocks pass by
_ITEM = 2  # bytes of a number


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


class Sample(NamedTuple):
    """Tiles of the weight gradient."""

    tile_i: int
    tile_o: int
    tile_m: int  # summed rows of one product
    stages: int

    @property
    def shared_memory(self) -> int:
        return _ITEM * (self.stages * self.tile_m * (self.tile_i + 2 * self.tile_o) + 2 * self.tile_i * self.tile_o)


def for_gather(m: int, features: int, inner: int, width: int, lines: int, kind: str = "") -> Gather:
    """The configuration of y [m, lines * width] summed over blocks [inner, width] of x [m, features]."""
    measured = _measured(kind).get(key("gather", m, inner, width))
    return Gather(**measured) if measured else next(candidates_for_gather(m, features, inner, width, lines))


def for_sample(m: int, i: int, o: int, nnzb: int, rows: int, kind: str = "") -> Sample:
    """The configuration of nnzb sampled blocks [i, o], in `rows` block rows, summed over m."""
    measured = _measured(kind).get(key("sample", m, i, o))
    return Sample(**measured) if measured else next(candidates_for_sample(i, o, nnzb, rows))


def candidates_for_gather(m: int, features: int, inner: int, width: int, lines: int) -> Iterator[Gather]:
    """What is worth trying, the heuristic's choice first: large tiles where there are enough for every program."""
    tile_n, tile_k = _divisor(width, 128), _divisor(inner, 64)
    stack = 64 // tile_k
    many = m * lines * (width // tile_n) >= 2 * 132 * 256
    for tile_m in (128, 64) if many else (64, 128):
        for cluster in (2, 1) if many and m >= 4096 and tile_n == 128 else (1, 2):
            band = max(1, CACHED // (2 * tile_m * cluster * features * _ITEM))
            yield from _deepest(Gather(tile_m, tile_n, tile_k, stack, 6, band, cluster))


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
def _measured(kind: str) -> dict:
    return json.loads(MEASURED.read_text()).get(kind, {}) if MEASURED.exists() else {}
