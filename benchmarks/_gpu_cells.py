"""What `gpu.py` times on a GPU: the grid, who competes in a cell, and what the hardware would allow at best."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import BlockPattern, block_diag_matmul, spmm

MODES = ("forward", "dX", "dW", "step")
PEAK, BANDWIDTH = 989e12, 3.35e12  # of an H100 SXM: FLOP/s in half precision, bytes/s of its memory (data sheet)


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

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.batch, *self.shape)))
        return f"{self.family} {size} block {self.block[0]} density {self.density:g} {self.dtype} {self.mode}"

    @functools.cached_property
    def pattern(self) -> BlockPattern:
        if self.family == "block-diagonal":
            return BlockPattern.block_diagonal(self.shape[0] // self.block[0], self.block)
        return BlockPattern.random(jax.random.key(0), self.shape, density=self.density, block=self.block)

    def predicted_ms(self) -> float:
        """A prediction, not a measurement: the longer of computing and of moving each array once, on an H100."""
        stored = self.pattern.nnzb * self.block[0] * self.block[1]
        products = {"forward": 1, "dX": 1, "dW": 1, "step": 3}[self.mode]
        moved = 2 * products * (stored + self.batch * sum(self.shape))
        return 1e3 * max(2 * products * self.batch * stored / PEAK, moved / BANDWIDTH)


def grid(toy: bool) -> list[Cell]:
    return list(_toy() if toy else _full())


def _toy() -> Iterator[Cell]:
    for mode in MODES:
        yield Cell("blocks", 32, (64, 64), (16, 16), 0.5, mode, "float32")
        yield Cell("block-diagonal", 32, (64, 64), (32, 32), 0.5, mode, "float32")
    yield Cell("unstructured", 4, (64, 64), (1, 1), 0.1, "forward", "float32")


def _full() -> Iterator[Cell]:
    for mode in MODES:
        for block in (128, 64, 32):
            for density in (0.1, 0.25, 0.5):
                yield Cell("blocks", 8192, (4096, 4096), (block, block), density, mode)
    for batch in (128, 1024, 8192):
        for count in (1, 2, 4, 8, 16):
            for width in (64, 128, 256, 512, 1024, 2048, 4096):
                for dtype in ("float16", "bfloat16"):
                    for mode in ("forward", "step"):
                        size = count * width
                        cell = Cell("block-diagonal", batch, (size, size), (width, width), 1 / count, mode, dtype)
                        if batch * size <= 2**27:
                            yield cell
    for batch in (256, 2048, 8192):
        yield Cell("unstructured", batch, (4096, 4096), (1, 1), 0.1, "step")
    for batch in (1, 4, 16):
        yield Cell("unstructured", batch, (4096, 4096), (1, 1), 0.1, "forward")


def contenders(cell: Cell, backends: list[str]) -> dict[str, Callable[[], object]]:
    """Name to a function that starts one run. The first call of each compiles."""
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
    weight = jnp.asarray(rng.standard_normal(cell.shape, np.float32), dtype)
    return found | {"dense": _run(jnp.matmul, cell.mode, x, weight, dy)} | _torch_bsr(cell, blocks)


def _diagonal(x, w, bias, backend):
    return block_diag_matmul(x, w, bias, activation="gelu", backend=backend)


def _einsum(x, w, bias):
    y = jnp.einsum("bni,nio->bno", x.reshape(len(x), len(w), -1), w)
    return jax.nn.gelu(y.reshape(len(x), -1) + bias)


def _loop(x, w, bias):
    parts = [part @ block for part, block in zip(jnp.split(x, len(w), axis=1), w, strict=True)]
    return jax.nn.gelu(jnp.concatenate(parts, axis=1) + bias)


def _run(f, mode: str, x, weight, dy) -> Callable[[], object]:
    """One product, one of its gradients, or a step: forward, both gradients and SGD. XLA drops what isn't asked for."""

    def measured(x, weight, dy):
        y, back = jax.vjp(f, x, weight)
        dx, dw = back(dy)
        return {"forward": y, "dX": dx, "dW": dw, "step": (y, dx, weight - jnp.asarray(1e-3, dw.dtype) * dw)}[mode]

    return functools.partial(jax.jit(measured), x, weight, dy)


def _torch_bsr(cell: Cell, blocks) -> dict[str, Callable[[], object]]:
    """PyTorch's product of a block-sparse matrix, where that machine has it: forward only, as it has no gradient."""
    if cell.family != "blocks" or cell.mode != "forward" or importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    p = cell.pattern.T  # BSR stores by row of torch's weight [out, in], which is a column of ours
    values = torch.tensor(np.asarray(blocks, np.float32)).to("cuda", torch.bfloat16).mT.contiguous()
    bounds, at = (torch.tensor(np.asarray(a)).cuda() for a in (p.col_ptr, p.row_index))
    weight = torch.sparse_bsr_tensor(bounds, at, values, size=cell.shape[::-1])
    x = torch.randn(cell.batch, cell.shape[0], device="cuda", dtype=torch.bfloat16)

    def run():
        y = torch.nn.functional.linear(x, weight)
        torch.cuda.synchronize()
        return y

    return {"torch BSR": run}
