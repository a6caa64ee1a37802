"""Up to which batch single entries are predicted to beat a dense product on an H100. Nothing here was measured.

A product takes as long as the busiest of four: memory, the two caches, arithmetic. The dense product reads the
matrix; ours streams entries from memory, and gathers from the first-level cache a sector or more for each.
"""

from pallas_kernels.triton.entries import CACHED, SECTOR, choose_tile

MEMORY = 3.35e12  # bytes/s, H100 SXM, data sheet
LEVEL_2 = 6.65e12  # bytes/s, as XLA's cost model of matrix products has it, measured
MULTIPROCESSORS = 132
LEVEL_1 = MULTIPROCESSORS * 128 * 1.98e9  # bytes/s: 128 a clock, if rows never fight over a bank
FLOAT32, HALF = 67e12, 989e12  # FLOP/s outside of and in tensor cores, data sheet


def worth_it(
    m: int, density: float, shape=(4096, 4096), *, itemsize: int = 2, index: int = 4, transposed=False
) -> bool:
    """Whether `seconds` is less than `dense_seconds`, for a batch of m and `index` bytes an index."""
    nnz = round(density * shape[0] * shape[1])
    ours = seconds(m, shape, nnz, itemsize=itemsize, index=index, transposed=transposed)
    return ours < dense_seconds(m, shape, itemsize=itemsize)


def seconds(m: int, shape: tuple[int, int], nnz: int, *, itemsize=2, index=4, transposed=False) -> float:
    """The least that x [m, in] times single entries takes; transposed, x [m, out], whose values lie scattered."""
    features, lines = shape[::-1] if transposed else shape
    tile = choose_tile(m, features, lines, nnz, itemsize)
    parts = -(-m // tile.batch)
    slice_of_x = features * tile.batch * itemsize
    streamed = nnz * (index + 4 if transposed else index + itemsize) + itemsize * m * (features + lines)
    gathered = nnz * parts * max(SECTOR, tile.batch * itemsize)
    cached = slice_of_x <= CACHED
    fetched = min(gathered, MULTIPROCESSORS * slice_of_x * parts) if cached else gathered
    level_2 = streamed * parts + fetched
    level_2 += nnz * parts * SECTOR if transposed else 0
    operations = 2 * nnz * parts * tile.batch
    return max(streamed / MEMORY, level_2 / LEVEL_2, gathered / LEVEL_1 if cached else 0, operations / FLOAT32)


def dense_seconds(m: int, shape: tuple[int, int], *, itemsize: int = 2) -> float:
    """The least that a dense product takes."""
    size, peak = shape[0] * shape[1], HALF if itemsize == 2 else FLOAT32
    return max(itemsize * (size + m * sum(shape)) / MEMORY, 2 * m * size / peak)
