"""Sizes of tiles: those measured to be best on a kind of GPU, and a heuristic for whatever was not measured."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHARED_MEMORY = 232_448 - 1024  # bytes a program may use on Hopper, less what the barriers take
MEASURED = Path(__file__).with_name("measured.json")  # {kind of GPU: {key: fields}}, written by benchmarks/gpu.py
CACHED = 2**24  # bytes of x that are worth keeping in the level-2 cache of 50 MB while blocks pass by
PIECE = 64  # rows that a tensor core makes at least
PROGRAMS = 132  # multiprocessors of an H100
DRAWING = 59  # of them draw all that its level-2 cache gives, 6.65 TB/s, at 64 bytes a clock each
OPERATIONS = 149  # of its tensor cores, 989 TFLOP/s, for each byte of that
SHARED = (
    OPERATIONS / 32
)  # bytes of all shared memories, 128 a clock each, for each byte of that: 4096 operations a clock
ARRIVING = SHARED / 2  # bytes that can arrive in all of them meanwhile
_ITEM = 2  # bytes of a number
_wanted = contextvars.ContextVar("wanted", default="any")  # kernels: any, or their measure, that without what was added


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
    columns: int  # tiles side by side, an even number
    stages: int  # of x
    w_stages: int  # of tiles of blocks, for each multiplying warpgroup
    band: int  # tiles (of a whole cluster) along the batch that share x in the cache
    cluster: int  # programs along the batch that share what they load of the blocks
    lines: int  # of a program, as many as its columns have room for or fewer
    sharing: int  # programs along the lines that share what they load of x: 1 or 2
    registers: int = 0  # 1 where a warpgroup reads a tile of x once for all its products, which takes registers

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


class Supertile(NamedTuple):
    """Tiles of the weight gradient by the kernel whose programs hold several pieces of it."""

    tile_o: int  # columns of a piece, which those of a block divide
    tile_m: int  # summed rows of one product
    rows: int  # pieces below each other in a band
    pieces: int  # of a program, an even number
    stages: int
    splits: int  # parts of the batch, each summed by a program of its own

    @property
    def shared_memory(self) -> int:
        stage = self.tile_m * (self.rows * PIECE + self.pieces * self.tile_o)
        out = 2 * PIECE * self.tile_o * (4 if self.splits > 1 else _ITEM)
        return _ITEM * self.stages * stage + out


def for_gather(
    m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None = None, kind: str = ""
) -> Gather | Union:
    """The configuration of y [m, lines * width], summed over nnzb blocks [inner, width] of x [m, features]; where
    nnzb is None, no two lines read the same source."""
    measured = None
    if nnzb is not None and _wanted.get() == "any":  # what was measured are blocks at random
        measured = _measured(kind).get(key("gather", m, nnzb * inner / (lines * features), inner, width))
    return _of_kind(measured, list(candidates_for_gather(m, features, inner, width, lines, nnzb)))


def line_by_line() -> contextlib.AbstractContextManager[None]:
    """What is lowered inside has the kernels whose programs hold one line, or two blocks: the others' measure."""
    return _only("line by line")


def x_apart() -> contextlib.AbstractContextManager[None]:
    """What is lowered inside has no programs that share x or hold it in registers: the measure of those that do."""
    return _only("x apart")


@contextlib.contextmanager
def _only(wanted: str) -> Iterator[None]:
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def for_sample(
    m: int, i: int, o: int, nnzb: int, rows: int, columns: int | None = None, kind: str = ""
) -> Sample | Supertile:
    """The configuration of nnzb sampled blocks [i, o], in so many block rows and columns, summed over m; where
    `columns` is None, no two blocks share a row or a column."""
    measured = None
    if columns is not None and _wanted.get() != "line by line":
        measured = _measured(kind).get(key("sample", m, nnzb / (rows * columns), i, o))
    return _of_kind(measured, list(candidates_for_sample(m, i, o, nnzb, rows, columns)))


def _of_kind(measured: Any, candidates: list[Any]) -> Any:
    """What was measured, unless its kernel isn't worth trying here, as on matrices with too little work for it."""
    return measured if type(measured) in {type(candidate) for candidate in candidates} else candidates[0]


def candidates_for_gather(
    m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None = None
) -> Iterator[Gather | Union]:
    """What is worth trying, the heuristic's choice first: of both kernels, the one that is predicted to be faster."""
    sizes = m, features, inner, width, lines, nnzb
    alone = list(_line_by_line_candidates(m, features, inner, width, lines))
    together = [] if _wanted.get() == "line by line" else list(_union_candidates(*sizes))
    if together and _cost(together[0], sizes) < _cost(alone[0], sizes):
        yield from (*together, *alone)
    else:
        yield from (*alone, *together)


def loaded(
    config: Gather | Union, m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None
) -> float:
    """Bytes that the level-2 cache gives to all programs together, the blocks lying at random."""
    nnzb = lines if nnzb is None else nnzb
    if isinstance(config, Gather):
        rows = 2 * config.tile_m
        tiles = -(-m // rows)
        return _ITEM * nnzb * tiles * inner * (rows * width // config.tile_n + width / config.cluster)
    sources, tiles = features / inner, -(-m // config.tile_m)
    groups, rest = divmod(lines, config.lines * config.sharing)
    free = 1 - nnzb / (lines * sources)  # the chance that a line doesn't read a source
    read = sources * (groups * (1 - free ** (config.lines * config.sharing)) + 1 - free**rest)
    return _ITEM * tiles * inner * (read * config.tile_m + nnzb * width / config.cluster)


def taken(config: Gather | Union, m: int, features: int, inner: int, width: int, lines: int, nnzb: int | None) -> float:
    """How long all programs take, the blocks lying at random, in bytes that the level-2 cache gives meanwhile.

    The busiest counts: that cache; the shared memory of a program with the most items, into which its tiles are written
    and out of which products read their operands; its tensor cores.
    """
    c, nnzb, sources = config, lines if nnzb is None else nnzb, features / inner
    free = 1 - nnzb / (lines * sources)  # the chance that a line doesn't read a source
    if isinstance(c, Gather):
        items, cluster, rows, held = lines * width // c.tile_n, c.cluster, 2 * c.tile_m, c.tile_n / width
        of_x = nnzb / lines
    else:
        items, cluster, rows = -(-lines // (c.lines * c.sharing)), c.cluster * c.sharing, c.tile_m
        held = lines / (items * c.sharing)
        of_x = sources * (1 - free**held)
    rounds = -(-(-(-m // (rows * c.cluster)) * items) // clusters(PROGRAMS, cluster))
    columns = nnzb / lines * held * width  # of an item, times what it sums over
    arrived = inner * (of_x * rows + columns)
    read = inner * columns / c.tile_n * rows / PIECE * (PIECE + c.tile_n)
    if isinstance(c, Union) and c.registers:  # each of two warpgroups reads x once for its half of the lines
        read = inner * (2 * sources * (1 - free ** (held / 2)) * rows + rows / PIECE * columns)
    moved = _ITEM * max(arrived / ARRIVING, (arrived + read) / SHARED)
    busiest = rounds * PROGRAMS * max(moved, 2 * inner * columns * rows / OPERATIONS)
    return max(loaded(c, m, features, inner, width, lines, nnzb), busiest)


def _cost(config: Gather | Union, sizes: tuple[int, int, int, int, int, int | None]) -> float:
    """The same, and something for what no prediction counts: programs that wait for each other, four or along the
    lines, and warpgroups that say at every step that x was read."""
    c, more = config, 0.0
    if isinstance(c, Union):
        more = (0.05 if c.cluster * c.sharing > 2 else 0.02 if c.sharing > 1 else 0) + 0.02 * c.registers
    return (1 + more) * taken(c, *sizes)


def clusters(multiprocessors: int, size: int) -> int:
    """How many clusters of so many programs surely run at once.

    They lie within groups of up to 18 multiprocessors, of which each chip lacks others: on an H100 some have found room
    for 15 clusters of 8, so 30 of 4. One more than there is room for would begin when all others have ended.
    """
    return max(1, (multiprocessors if size <= 2 else multiprocessors * 10 // 11) // size)


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
    """128 x 384 sums, all that two warpgroups hold, or fewer, as where x is in registers too; none where that is too
    little work for every program. Narrower tiles spill registers. The best of each way to share and to hold x."""
    tile_n, tile_k = _divisor(width, 64), _divisor(inner, 64)
    if nnzb is None or tile_n < 32:
        return
    found: dict[tuple[int, int, int], list[Union]] = {}
    ways = ((2, 1, 0),)
    if _wanted.get() == "any":
        ways = (*ways, (1, 2, 0), (2, 2, 0), (2, 1, 1), (1, 2, 1), (2, 2, 1))
    for most in (384, 320, 256):
        columns = most // width * (width // tile_n)
        items = -(-m // 256) * -(-lines * width // most)
        if columns and columns % 2 == 0 and items >= 66:
            in_registers = most < 384 and tile_k >= tile_n  # as there is room, and whole layouts of shared memory
            for cluster, sharing, registers in ways if in_registers else [way for way in ways if not way[2]]:
                band = max(1, CACHED // (cluster * 128 * features * _ITEM))
                fewest = -(-lines // (most // width * sharing))
                for groups in range(fewest, fewest + 2):
                    dealt = -(-lines // (groups * sharing)), sharing, registers
                    config = Union(128, tile_n, tile_k, columns, 8, 384 // tile_n, band, cluster, *dealt)
                    found.setdefault((cluster, sharing, registers), []).append(config)

    sizes = m, features, inner, width, lines, nnzb
    best: list[Union] = [min(configs, key=lambda config: _cost(config, sizes)) for configs in found.values()]
    for config in sorted(best, key=lambda config: _cost(config, sizes)):
        yield next(_deepest(config))


def candidates_for_sample(
    m: int, i: int, o: int, nnzb: int, rows: int, columns: int | None = None
) -> Iterator[Sample | Supertile]:
    """The same for the weight gradient."""
    sizes = m, i, o, nnzb, rows, columns or rows
    alone = list(_two_block_candidates(i, o, nnzb, rows))
    together = [] if columns is None or _wanted.get() == "line by line" else list(_supertile_candidates(*sizes))
    if together and sampled(together[0], *sizes) < sampled(alone[0], *sizes):
        yield from (*together, *alone)
    else:
        yield from (*alone, *together)


def _two_block_candidates(i: int, o: int, nnzb: int, rows: int) -> Iterator[Sample]:
    """A row of a single piece would leave a warpgroup idle, so it gets two."""
    tile_i, tile_o = max(PIECE, _divisor(i, 128)), _divisor(o, 128)
    if nnzb * (o // tile_o) < 1.5 * rows and tile_o >= 32:
        tile_o //= 2
    for width in (tile_o, tile_o // 2) if tile_o >= 64 else (tile_o,):
        yield from _deepest(Sample(tile_i, width, 64, 6))


def _supertile_candidates(m: int, i: int, o: int, nnzb: int, rows: int, columns: int) -> Iterator[Supertile]:
    """As many sums as two warpgroups hold; in low bands where much is stored, in high ones where little is.

    Narrow tiles of several blocks, and high bands of narrow tiles or of blocks of 16, spill registers.
    """
    if max(i, o) > PIECE or columns * o > 2**19:  # numbers of tiles are kept in 15 bits
        return
    found = []
    for tile_o in {o, PIECE} - {16}:
        for band, stages in ((4, 3), (8, 2)) if tile_o == PIECE and max(i, o) > 16 else ((4, 3),):
            cut = [
                Supertile(tile_o, 32, band, 49_152 // (PIECE * tile_o), stages, splits)
                for splits in range(1, 1 + min(8, -(-m // 512)))
            ]
            found.append(min(cut, key=lambda config: sampled(config, m, i, o, nnzb, rows, columns)))
    yield from sorted(found, key=lambda config: sampled(config, m, i, o, nnzb, rows, columns))


def sampled(config: Sample | Supertile, m: int, i: int, o: int, nnzb: int, rows: int, columns: int) -> float:
    """How long all programs take, the blocks lying at random, in bytes that the level-2 cache gives meanwhile.

    The busier of the cache and of the tensor cores counts. Sums of parts of the batch are written meanwhile, and read
    afterwards from memory, at half the rate of the cache.
    """
    c = config
    if isinstance(c, Sample):
        items = (nnzb * (o // c.tile_o) + rows / 2) // 2 * max(1, i // c.tile_i)
        return m * _slowest(items, c.tile_i + 2 * c.tile_o, 2 * c.tile_i * c.tile_o, c.tile_o)
    groups, x_tiles, dy_tiles = groups_of(c, i, o, nnzb, rows, columns)
    loads, products = x_tiles * PIECE + dy_tiles * c.tile_o, c.pieces * PIECE * c.tile_o
    sums = (4 * c.splits + 2 * (4 * c.splits + _ITEM)) * nnzb * i * o if c.splits > 1 else 0
    return m / c.splits * _slowest(groups * c.splits, loads, products, c.tile_o) + sums


def sampled_through_shared_memory(
    config: Sample | Supertile, m: int, i: int, o: int, nnzb: int, rows: int, columns: int
) -> float:
    """How long the same takes by what is written into shared memory, zeros too, and read by products, alone."""
    c = config
    if isinstance(c, Sample):
        items = (nnzb * (o // c.tile_o) + rows / 2) // 2 * max(1, i // c.tile_i)
        arrived, read = c.tile_i + 2 * c.tile_o, 2 * c.tile_i / PIECE * (PIECE + c.tile_o)
    else:
        items = groups_of(c, i, o, nnzb, rows, columns)[0] * c.splits
        arrived, read = c.rows * PIECE + c.pieces * c.tile_o, c.pieces * (PIECE + c.tile_o)
        m = -(-m // c.splits)
    moved = _ITEM * max(arrived / ARRIVING, (arrived + read) / SHARED)
    return m * PROGRAMS * math.ceil(items / PROGRAMS) * moved


def groups_of(c: Supertile, i: int, o: int, nnzb: int, rows: int, columns: int) -> tuple[float, float, float]:
    """How many groups of pieces there are, and how many tiles of x and of dy one loads, the blocks lying at random."""
    pieces, tiles = -(-rows * i // PIECE), -(-columns * o // c.tile_o)
    stored = 1 - (1 - nnzb / (rows * columns)) ** (PIECE // i * (c.tile_o // o))
    bands = -(-pieces // c.rows)
    high = pieces / bands
    in_band = stored * high * tiles
    groups = max(1, in_band / c.pieces + 0.5)  # in a band, whose last group is half full
    x_tiles = high * (1 - (1 - 1 / high) ** (in_band / groups))
    dy_tiles = (tiles * (1 - (1 - stored) ** high) + groups - 1) / groups  # two groups share the tile between them
    return bands * groups, x_tiles, dy_tiles


def _slowest(items: float, loads: float, products: float, tile_n: int) -> float:
    """The same for items of work that load and multiply so many numbers for each row of the batch.

    Programs that have nothing left to do leave the cache to the others, but not their tensor cores.
    """
    whole, rest = divmod(items, PROGRAMS)
    drawing = whole * PROGRAMS + (max(rest, DRAWING) if rest else 0)
    multiplied = products * PROGRAMS * math.ceil(items / PROGRAMS)
    return max(_ITEM * loads * drawing, 2 * multiplied * waits(tile_n) / OPERATIONS)


def waits(tile_n: int) -> float:
    """How many times as long a product of 64 rows and so many columns takes as tensor cores need for it.

    Both operands come from shared memory, at 128 bytes a clock.
    """
    return max(1, (PIECE + tile_n) / (2 * tile_n))


def key(kernel: str, m: int, density: float, *block: int) -> str:
    """What a measurement is good for: a kernel, a block, densities up to 1.4 times more or less, and batches of up to
    the next power of two."""
    stored = f"1/{2 ** round(-math.log2(density))}" if density else "0"
    return f"{kernel} {'x'.join(map(str, block))} density {stored} batch {1 << max(m - 1, 0).bit_length()}"


def _deepest(config):
    """The configuration with as many stages as shared memory holds, then one less."""
    stages = config.stages
    while config._replace(stages=stages).shared_memory > SHARED_MEMORY:
        stages -= 1
    yield from (config._replace(stages=s) for s in (stages, stages - 1) if s >= 2)


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(most, size & -size)


def write(kind: str, best: dict[str, dict[str, int]]) -> None:
    """Keeps configurations, as fields by `key`, that were the best on a kind of GPU."""
    table = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    MEASURED.write_text(json.dumps(table | {kind: table.get(kind, {}) | best}, indent=1) + "\n")
    _measured.cache_clear()


@functools.cache
def _measured(kind: str) -> dict[str, Any]:
    table = json.loads(MEASURED.read_text()).get(kind, {}) if MEASURED.exists() else {}
    return {name: of_fields(fields) for name, fields in table.items()}


def of_fields(fields: dict[str, int]) -> Gather | Union | Sample | Supertile:
    """The configuration that has just these fields."""
    return next(kind(**fields) for kind in (Gather, Union, Sample, Supertile) if set(kind._fields) == set(fields))
