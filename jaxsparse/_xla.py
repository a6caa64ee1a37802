"""The back end that runs on every device: plain XLA, bounded temporaries, no scatter with repeated indices.

On a CPU, block products walk over *slots*: step j multiplies the j-th stored block of every output column at once, as
one batched product over gathered slices of x. A step holds O(batch * out * i / o) numbers, so nothing of size
batch * nnz exists, and each column is summed in a fixed order. Columns are taken by falling length, in
batches that shrink to an eighth when only so many are left: few long columns don't make the others wait.

Unstructured matrices have two ways. Measured on 2 AVX-512 cores (JAX 0.10.2, float32, 2048 x 2048, batch 256): slots
take 2.9 / 5.8 / 13.5 ms at density 0.02 / 0.1 / 0.2, expanding to a dense matrix and multiplying takes 12 to 16 ms at
any density. So a CPU takes slots below `SLOTS_BELOW`; its sampled product, which gathers two vectors per entry,
already loses to one dense product at 0.05. Other devices multiply dense matrices so much faster than they gather that
they expand, blocks too: each step of the walk writes and reads what it gathers and its sums. Nobody expands more than
`DENSE_LIMIT` entries; beyond that, other devices walk by a number of steps that no pattern changes, as a GPU has to
ask the host whether another follows. On an H100 in bfloat16, 8192 x 4096 x 4096 with blocks of 64 at 25 %, by bytes
and operations (nothing was timed): the walk takes 1.3 ms and 8 such questions, the dense product 0.28 ms, expanding
its weight 0.02.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxsparse._groups import compress, expand
from jaxsparse._indices import Index, stored_columns
from jaxsparse._sizes import grid_of, is_unstructured, values_shape
from jaxsparse._xla_walk import walk

SLOTS_BELOW = 0.15  # density under which a CPU multiplies by slots
CHUNKS_BELOW = 0.03  # density under which a CPU samples a product entry by entry
DENSE_LIMIT = 2**26  # entries of an unstructured matrix that may be expanded for one product

OPS = ("spmm", "sddmm", "spmm_grads", "block_diag_matmul", "block_diag_outer", "n_m_spmm", "n_m_sddmm")
# What XLA may take for granted about places of stored entries, column by column.
_AS_STORED = {
    "unique_indices": True,
    "indices_are_sorted": True,
    "mode": "promise_in_bounds",
    "wrap_negative_indices": False,
}
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def why_not(op: str, dtype, block: tuple[int, int], platform: str, elsewhere: bool = False) -> str | None:
    """None: XLA runs everything."""
    return None


def block_diag_matmul(
    x: Float[Array, "m features"],
    blocks: Float[Array, "n i o"],
    bias: Float[Array, " out"] | None = None,
    *,
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
) -> Float[Array, "m out"]:
    """Slice n of `x` times block n (its transpose if `transposed`), then bias and activation."""
    n, contract = blocks.shape[0], 2 if transposed else 1
    if n == 1:
        return _finish(_dot(x, blocks[0], ((1, contract - 1),), precision), bias, activation, x.dtype)

    def batched(x):
        return _dot(x, blocks, ((2, contract), (0, 0)), precision)  # [n, m, out/n]

    x = x.reshape(x.shape[0], n, x.shape[1] // n)
    y = _batch_first(batched, x).swapaxes(0, 1)
    return _finish(y.reshape(x.shape[0], n * y.shape[2]), bias, activation, x.dtype)


def block_diag_outer(
    x: Float[Array, "m in"], dy: Float[Array, "m out"], num_blocks: int, *, precision=None
) -> Float[Array, "n i o"]:
    """The diagonal blocks of x^T dy."""
    if num_blocks == 1:
        return _dot(x, dy, ((0, 0),), precision).astype(x.dtype)[None]
    x, dy = (a.reshape(a.shape[0], num_blocks, a.shape[1] // num_blocks) for a in (x, dy))
    dw = _batch_first(lambda x, dy: _dot(x, dy, ((1, 1), (0, 0)), precision), x, dy)
    return dw.astype(x.dtype)


def spmm(
    x: Float[Array, "m features"],
    blocks: Float[Array, " *values"],
    index: Index,
    bias: Float[Array, " out"] | None = None,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
) -> Float[Array, "m out"]:
    """x W, or x W^T if `transposed`, then bias and activation; `index`, `shape`, `block` are those of W."""
    out = shape[0] if transposed else shape[1]
    if 0 in (blocks.shape[0], x.shape[0]):
        y = jnp.zeros((x.shape[0], out), wide(x.dtype))
    elif not is_unstructured(block):
        y = _blocks(x, blocks, index, shape, block, transposed, precision)
    else:
        y = _unstructured(x, blocks, index, shape, transposed, precision)
    return _finish(y, bias, activation, x.dtype)


def sddmm(
    x: Float[Array, "m in"],
    dy: Float[Array, "m out"],
    index: Index,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    precision=None,
) -> Float[Array, " *values"]:
    """The blocks of x^T dy that W stores."""
    nnzb = index.row_index.shape[0]
    if 0 in (nnzb, x.shape[0]):
        return jnp.zeros(values_shape(nnzb, block), x.dtype)

    def chunks(x, dy):
        return _sampled_chunks(x, dy, index, shape, block, precision)

    def stored(dense):
        if not is_unstructured(block):
            dense = _in_blocks(dense, shape, block)
        at = dense.at[index.row_index, stored_columns(index)]
        return at.get(mode="promise_in_bounds", wrap_negative_indices=False)

    def expand(x, dy):
        # A GPU rounds as it writes the product, which is then half as large; a CPU rounds only what is kept.
        return jax.lax.platform_dependent(
            _dot(x, dy, ((0, 0),), precision),
            cpu=lambda total: stored(total).astype(x.dtype),
            default=lambda total: stored(total.astype(x.dtype)),
        )

    if not is_unstructured(block):
        return _by_device(shape, chunks, expand)(x, dy)
    return _by_density(nnzb, shape, CHUNKS_BELOW, chunks, expand)(x, dy)


def spmm_grads(
    x: Float[Array, "m in"],
    dy: Float[Array, "m out"],
    blocks: Float[Array, " *values"],
    index: Index,
    *,
    shape: tuple[int, int],
    block: tuple[int, int],
    precision=None,
) -> tuple[jax.Array, jax.Array]:
    """(dy W^T, the blocks of x^T dy that W stores). XLA gains nothing by fusing them."""
    sizes = {"shape": shape, "block": block, "precision": precision}
    return spmm(dy, blocks, index, transposed=True, **sizes), sddmm(x, dy, index, **sizes)


def n_m_spmm(
    x: Float[Array, "m features"],
    values: Float[Array, "groups n out"],
    bits: UInt[Array, "groups out"],
    bias: Float[Array, " out"] | None = None,
    *,
    n: int,
    m: int,
    shape: tuple[int, int],
    transposed: bool = False,
    activation: str | None = None,
    precision=None,
) -> Float[Array, "m out"]:
    """x W, or x W^T if `transposed`, then bias and activation; W is expanded for the product."""
    w = expand(values, bits, m, shape[0])
    return _finish(_dot(x, w, ((1, 1 if transposed else 0),), precision), bias, activation, x.dtype)


def n_m_sddmm(
    x: Float[Array, "m in"],
    dy: Float[Array, "m out"],
    bits: UInt[Array, "groups out"],
    *,
    n: int,
    m: int,
    shape: tuple[int, int],
    precision=None,
) -> Float[Array, "groups n out"]:
    """x^T dy where W is stored."""
    return compress(_dot(x, dy, ((0, 0),), precision), bits, n, m).astype(x.dtype)


# ---- blocks ---------------------------------------------------------------------------------------


def _blocks(x, blocks, index, shape, block, transposed, precision):
    def slots(x, blocks):
        out = shape[0] if transposed else shape[1]
        return _block_slots(x, blocks, index, shape, block, transposed, precision)[:, :out]

    def expand(x, blocks):
        rows, cols = grid_of(shape, block)
        w = jnp.zeros((cols, rows, *block), blocks.dtype)
        at = w.at[stored_columns(index), index.row_index]
        w = at.set(blocks, **_AS_STORED)
        w = w.transpose(1, 2, 0, 3).reshape(rows * block[0], cols * block[1])[: shape[0], : shape[1]]
        return _dot(x, w, ((1, 1 if transposed else 0),), precision)

    return _by_device(shape, slots, expand)(x, blocks)


def _in_blocks(dense, shape, block):
    """A matrix as [block row, block column, i, o], filled up with zeros."""
    (rows, cols), (i, o) = grid_of(shape, block), block
    dense = jnp.pad(dense, ((0, rows * i - shape[0]), (0, cols * o - shape[1])))
    return dense.reshape(rows, i, cols, o).transpose(0, 2, 1, 3)


def _block_slots(x, blocks, index, shape, block, transposed, precision):
    grid, block = grid_of(shape, block), block
    if transposed:
        grid, block = grid[::-1], block[::-1]
    (i, o), m = block, x.shape[0]
    # Features first: a gathered slice is one run of memory, and several slots stack along the contraction.
    xt = _copy(_pad_features(x, grid[0] * i).T).reshape(grid[0], i, m)
    stacked = max(32 // i, 2 if i < 128 else 1)  # measured: 2 gains 20 % for blocks of 16 to 64, 4 gains nothing

    def step(source, entry, acc):
        gathered = xt.at[source].get(mode="fill", fill_value=0).reshape(-1, stacked * i, m)
        w = blocks.at[entry].get(mode="fill", fill_value=0)
        w = w.swapaxes(2, 3) if transposed else w
        return acc + _dot(w.reshape(-1, stacked * i, o), gathered, ((1, 1), (0, 0)), precision)

    start = jnp.zeros((grid[1], o, m), wide(x.dtype))
    return walk(step, start, index, transposed, stacked, grid[0]).reshape(-1, m).T


def _sampled_chunks(x, dy, index, shape, block, precision):
    """Blocks of x^T dy by chunks of entries whose gathered slices are twice as large as x and dy together."""
    (i, o), grid, m = block, grid_of(shape, block), x.shape[0]
    xt = _pad_features(x, grid[0] * i).T.reshape(grid[0], i, m)
    dyt = _pad_features(dy, grid[1] * o).T.reshape(grid[1], o, m)

    def chunk(at):
        return _dot(xt[at[0]], dyt[at[1]], ((2, 2), (0, 0)), precision).astype(x.dtype)

    nnzb = index.row_index.shape[0]
    size = min(nnzb, max(1, 2 * (shape[0] + shape[1]) // (i + o)))
    steps = -(-nnzb // size)
    at = jnp.stack([index.row_index, stored_columns(index)])
    at = jnp.pad(at, ((0, 0), (0, steps * size - nnzb))).reshape(2, steps, size)
    values = jax.lax.map(chunk, at.swapaxes(0, 1)).reshape(-1, i, o)[:nnzb]
    return values.reshape(values_shape(nnzb, block))


# ---- unstructured ---------------------------------------------------------------------------------


def _unstructured(x, values, index, shape, transposed, precision):
    def slots(x, values):
        xt = _copy(x.T)

        def step(source, entry, acc):
            weight = values.at[entry[:, 0]].get(mode="fill", fill_value=0)
            row = xt.at[source[:, 0]].get(mode="fill", fill_value=0)
            return acc + row.astype(acc.dtype) * weight[:, None].astype(acc.dtype)

        start = jnp.zeros((shape[0 if transposed else 1], x.shape[0]), wide(x.dtype))
        return walk(step, start, index, transposed, 1, x.shape[1]).T

    def expand(x, values):
        # Stored by output column, so writing the transpose is a sorted scatter: four times faster on a CPU.
        wt = jnp.zeros(shape[::-1], values.dtype)
        at = wt.at[stored_columns(index), index.row_index]
        wt = at.set(values, **_AS_STORED)
        return _dot(x, wt, ((1, 0 if transposed else 1),), precision)

    return _by_density(values.shape[0], shape, SLOTS_BELOW, slots, expand)(x, values)


def _by_density(nnz: int, shape, crossover: float, sparse, dense):
    """Which of two ways multiplies an unstructured matrix: by size, by density, and by device at lowering."""
    size = shape[0] * shape[1]
    if crossover * size <= nnz and size <= DENSE_LIMIT:
        return dense
    return _by_device(shape, sparse, dense)


def _by_device(shape, sparse, dense):
    """`sparse` on a CPU, and for matrices that are too large to be expanded; `dense` on other devices."""
    if shape[0] * shape[1] > DENSE_LIMIT:
        return sparse
    return lambda *args: jax.lax.platform_dependent(*args, cpu=sparse, default=dense)


# ---- shared ---------------------------------------------------------------------------------------


def _batch_first(product, *operands):
    """`product` of operands [m, n, ...] brought to [n, m, ...]. A CPU wants that as a copy of its own: left to
    XLA, the same product runs up to twice as slow. Elsewhere the product reads strided operands in place."""

    def copied(*operands):
        return _copy(product(*(_copy(a.swapaxes(0, 1)) for a in operands)))

    def strided(*operands):
        return product(*(a.swapaxes(0, 1) for a in operands))

    return jax.lax.platform_dependent(*operands, cpu=copied, default=strided)


def _copy(x):
    return jax.lax.optimization_barrier(x)


def _dot(a, b, dims, precision):
    """A product summed in float32 or wider; `dims` are the contracted pair, then the batched one."""
    (ca, cb), *batch = dims
    dims = (((ca,), (cb,)), ((batch[0][0],), (batch[0][1],)) if batch else ((), ()))
    total = wide(a.dtype)

    def direct(a, b):
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=total)

    def widened(a, b):
        return direct(a.astype(total), b.astype(total))

    if a.dtype == total:
        return direct(a, b)
    # XLA for CPU has no half x half = float32 product of some shapes; half numbers widen exactly.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=direct)


def _pad_features(x, size: int):
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def wide(dtype):
    """The dtype of sums: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _finish(y, bias, activation: str | None, dtype):
    """Bias and activation on the wide sum, then the one rounding."""
    y = y if bias is None else y + bias.astype(y.dtype)
    return (ACTIVATIONS[activation](y) if activation else y).astype(dtype)
