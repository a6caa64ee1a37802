"""What `gpu.py` times on a GPU: the grid, and who competes in a cell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu_run import Program
from jaxsparse import BlockPattern, block_diag_matmul, spmm
from pallas_kernels.mosaic import configs

LINE_BY_LINE = "ours (mosaic, line by line)"  # the kernel whose programs hold one line, whatever is chosen
X_APART = "ours (mosaic, x apart)"  # programs that hold several lines, but neither share x nor hold it in registers
MODES = ("forward", "dX", "dW", "step")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workload: x [batch, in] times W, of a density in blocks, or of blocks on the diagonal."""

    family: str
    batch: int
    shape: tuple[int, int]
    block: tuple[int, int]
    density: float
    mode: str
    dtype: str = "bfloat16"
    layers: int = 1  # products in a row, each with weights of its own, so that they come from memory as in a model

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.batch, *self.shape)))
        layers = f" x{self.layers}" if self.layers > 1 else ""
        return f"{self.family} {size} block {self.block[0]} density {self.density:g} {self.dtype} {self.mode}{layers}"

    @functools.cached_property
    def pattern(self) -> BlockPattern:
        if self.family == "block-diagonal":
            return BlockPattern.block_diagonal(self.shape[0] // self.block[0], self.block)
        return BlockPattern.random(jax.random.key(0), self.shape, density=self.density, block=self.block)


def grid(toy: bool) -> list[Cell]:
    """All cells, those first that decide what `backend=None` takes."""
    return list(dict.fromkeys(_toy() if toy else (*deciding(), *wider(), *_rest())))


def deciding() -> Iterator[Cell]:
    """The cells of the first minutes."""
    for batch in (8192, 512):
        for block in (128, 64, 32):
            for density in (0.1, 0.25, 0.5):
                modes = ("forward", "dW", "step") if batch == 8192 and block < 128 else ("forward", "step")
                for mode in modes:  # dW alone where one of two kernels may be taken
                    yield Cell("blocks", batch, (4096, 4096), (block, block), density, mode)
    for count in (4, 16):
        for width in (256, 1024):
            for mode in ("forward", "step"):
                yield Cell("block-diagonal", 1024, (count * width,) * 2, (width, width), 1 / count, mode)
    for batch in (1, 16):
        yield Cell("unstructured", batch, (4096, 4096), (1, 1), 0.1, "forward", layers=32)
    yield Cell("unstructured", 2048, (4096, 4096), (1, 1), 0.1, "step")


def _toy() -> Iterator[Cell]:
    for mode in MODES:
        yield Cell("blocks", 32, (64, 64), (16, 16), 0.5, mode, "float32")
        yield Cell("block-diagonal", 32, (64, 64), (32, 32), 0.5, mode, "float32")
    yield Cell("unstructured", 4, (64, 64), (1, 1), 0.1, "step", "float32")
    yield Cell("unstructured", 4, (64, 64), (1, 1), 0.1, "forward", "float32", layers=2)


def wider() -> Iterator[Cell]:
    """The cells of the second call: as many as its minutes hold."""
    for mode in MODES:
        for block in (128, 64, 32):
            for density in (0.1, 0.25, 0.5):
                yield Cell("blocks", 8192, (4096, 4096), (block, block), density, mode)
    for batch in (256, 2048, 8192):
        yield Cell("unstructured", batch, (4096, 4096), (1, 1), 0.1, "step")
    for density in (0.05, 0.1, 0.25):
        for batch in (1, 4, 16, 64):
            yield Cell("unstructured", batch, (4096, 4096), (1, 1), density, "forward", layers=32)
    for cell in _rest():
        some = cell.batch in (128, 8192) and cell.shape[0] // cell.block[0] in (4, 16) and cell.dtype == "bfloat16"
        if cell.family == "block-diagonal" and some and cell.block[0] in (64, 256, 1024):
            yield cell


def _rest() -> Iterator[Cell]:
    for batch in (128, 1024, 8192):
        for count in (1, 2, 4, 8, 16):
            for width in (64, 128, 256, 512, 1024, 2048, 4096):
                for dtype in ("float16", "bfloat16"):
                    for mode in ("forward", "step"):
                        size = count * width
                        cell = Cell("block-diagonal", batch, (size, size), (width, width), 1 / count, mode, dtype)
                        if batch * size <= 2**27:
                            yield cell
    for density in (0.05, 0.1, 0.25):
        for batch in (1, 2, 4, 8, 16, 32, 64):
            yield Cell("unstructured", batch, (4096, 4096), (1, 1), density, "forward", layers=32)


def contenders(cell: Cell, backends: list[str]) -> dict[str, Program]:
    """The programs of a cell by name, not compiled yet."""
    if cell.layers > 1:
        return _chains(cell, backends)
    rng, dtype = np.random.default_rng(0), jnp.dtype(cell.dtype)
    shapes = ((cell.batch, cell.shape[0]), (cell.batch, cell.shape[1]), cell.pattern.values_shape, cell.shape[1:])
    x, dy, blocks, bias = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)
    ours = {f"ours ({backend or 'chosen'})": backend for backend in [*backends, "xla", None]}
    if cell.family == "block-diagonal":
        n = cell.pattern.nnzb
        fused = {name: functools.partial(_diagonal, bias=bias, backend=backend) for name, backend in ours.items()}
        unfused = {
            "einsum": functools.partial(_einsum, bias=bias),
            "loop of linears": functools.partial(_loop, bias=bias),
        }
        return {
            name: _run(f, cell.mode, x, blocks.reshape(n, *cell.block), dy) for name, f in (fused | unfused).items()
        }
    found = {name: functools.partial(spmm, pattern=cell.pattern, backend=backend) for name, backend in ours.items()}
    found = {name: _run(f, cell.mode, x, blocks, dy) for name, f in found.items()}
    if "mosaic" in backends:
        product = functools.partial(spmm, pattern=cell.pattern, backend="mosaic")
        found[LINE_BY_LINE] = _run(product, cell.mode, x, blocks, dy, within=configs.line_by_line)
        if shares_x(cell):
            found[X_APART] = _run(product, cell.mode, x, blocks, dy, within=configs.x_apart)
    weight = jnp.asarray(rng.standard_normal(cell.shape, np.float32), dtype)
    return found | {"dense": _run(jnp.matmul, cell.mode, x, weight, dy)}


def shares_x(cell: Cell) -> bool:
    """Whether the Mosaic kernel of y or of dx has programs that share x, or hold it in registers."""
    (i, o), (rows, columns), nnzb = cell.block, cell.pattern.grid, cell.pattern.nnzb
    forward = cell.batch, cell.shape[0], i, o, columns, nnzb
    backward = cell.batch, cell.shape[1], o, i, rows, nnzb
    asked = {"forward": (forward,), "dX": (backward,), "dW": (), "step": (forward, backward)}[cell.mode]
    chosen = (configs.for_gather(*sizes) for sizes in asked)
    return any(isinstance(config, configs.Union) and config.sharing + config.registers > 1 for config in chosen)


def _chains(cell: Cell, backends: list[str]) -> dict[str, Program]:
    """The same of several products in a row; where a back end reads indices of 16 bits, with those as well."""
    rng, dtype, pattern = np.random.default_rng(0), jnp.dtype(cell.dtype), cell.pattern
    x, values, weight = (
        jnp.asarray(rng.standard_normal(shape, np.float32) * pattern.fan_in**-0.5, dtype)
        for shape in ((cell.batch, cell.shape[0]), pattern.values_shape, cell.shape)
    )
    narrow = dataclasses.replace(pattern, row_index=pattern.row_index.astype(jnp.uint16))

    found = {"dense": chain(cell.layers, x, jnp.matmul, weight)}
    for backend in [*backends, "xla", None]:
        product = functools.partial(spmm, backend=backend)
        found[f"ours ({backend or 'chosen'})"] = chain(cell.layers, x, product, values, pattern)
        if backend in ("triton", "interpret"):
            found[f"ours ({backend}, 16-bit indices)"] = chain(cell.layers, x, product, values, narrow)
    return found


def chain(count: int, x, product, *weights) -> Program:
    """`count` products in a row, each with its own copy of the weights."""
    layers = [jax.tree.map(jnp.copy, weights) for _ in range(count)]
    return Program(lambda x, layers: functools.reduce(lambda x, weights: product(x, *weights), layers, x), x, layers)


def _diagonal(x, w, bias, backend):
    return block_diag_matmul(x, w, bias, activation="gelu", backend=backend)


def _einsum(x, w, bias):
    y = jnp.einsum("bni,nio->bno", x.reshape(len(x), len(w), -1), w)
    return jax.nn.gelu(y.reshape(len(x), -1) + bias)


def _loop(x, w, bias):
    parts = [part @ block for part, block in zip(jnp.split(x, len(w), axis=1), w, strict=True)]
    return jax.nn.gelu(jnp.concatenate(parts, axis=1) + bias)


def _run(f, mode: str, x, weight, dy, within: Callable = contextlib.nullcontext) -> Program:
    """One product, one of its gradients, or a step: forward, both gradients and SGD. XLA drops what isn't asked for."""

    def measured(x, weight, dy):
        y, back = jax.vjp(f, x, weight)
        dx, dw = back(dy)
        return {"forward": y, "dX": dx, "dW": dw, "step": (y, dx, weight - jnp.asarray(1e-3, dw.dtype) * dw)}[mode]

    return Program(measured, x, weight, dy, within=within)
