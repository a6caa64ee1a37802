"""Matrices that store few of their entries, and what the C++ kernels compute with them on CPU tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpu_kernels import direct

_WIDE = (torch.float32, torch.float64)
# Features of a block from which on torch's own product is faster, by the instruction set of the kernels.
_DENSE = {
    "forward": {"avx512": 256, "avx2": 64, "portable": 16},
    "backward": {"avx512": 64, "avx2": 64, "portable": 16},
}
_IN_PLACE = 1024  # features of a block from which on its result is written where it belongs
WHY_NOT = direct.why_not(torch)  # the reason why CPU tensors can't be multiplied here without JAX, if there is one


@functools.cache
def _isa() -> str:
    return direct.isa()


@functools.cache
def _kernels() -> direct.Kernels:
    return direct.Kernels(torch)


@dataclasses.dataclass(frozen=True, slots=True)
class Sparse:
    """A matrix of which blocks, or single entries, are stored.

    Attributes:
      index: col_ptr, row_index, row_ptr, col_index and order of a pattern, int32.
      sizes: (in, out, i, o) as stored.
      transposed: whether the transpose is meant; the index and the values stay as they are.
    """

    index: tuple[Tensor, ...]
    sizes: tuple[int, int, int, int]
    transposed: bool = False

    @property
    def T(self) -> Sparse:
        return Sparse(self.index, self.sizes, not self.transposed)

    def with_index(self, index: Sequence[Tensor]) -> Sparse:
        return Sparse(tuple(index), self.sizes, self.transposed)

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y = like(x, self.sizes[0 if self.transposed else 1])
        lines = self.index[2:] if self.transposed else (*self.index[:2], None)
        _kernels().spmm(plain(x), plain(w), lines, bias, y, self.sizes, self.transposed)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        values = x.new_empty(self.values_shape)
        _kernels().sddmm(plain(x), plain(dy), self.index[:2], values, self.sizes)
        return values

    def gradients(self, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dy W^T, sample(x, dy)) of single entries stored by column, in one pass over dy."""
        dx, dw = like(x, self.sizes[0]), w.new_empty(w.shape)
        _kernels().spmm_grads(plain(x), plain(dy), plain(w), self.index[2:], dx, dw, self.sizes)
        return dx, dw

    @property
    def fuses_gradients(self) -> bool:
        return not self.transposed and self.sizes[2:] == (1, 1)

    def operator(self, name: str, *operands) -> Any:
        """The method of this name as one of torch's operators."""
        index, sizes = list(self.index), list(self.sizes)
        if name == "multiply":
            return torch.ops.jaxsparse.spmm(*operands, index, sizes, self.transposed)
        if name == "gradients":
            return torch.ops.jaxsparse.spmm_grads(*operands, index, sizes)
        return torch.ops.jaxsparse.sddmm(*(operands[::-1] if self.transposed else operands), index, sizes)

    @property
    def values_shape(self) -> tuple[int, ...]:
        nnzb, (i, o) = self.index[1].shape[0], self.sizes[2:]
        return (nnzb,) if (i, o) == (1, 1) else (nnzb, i, o)


@dataclasses.dataclass(frozen=True, slots=True)
class Diagonal:
    """A block-diagonal matrix of `sizes` = (n, i, o)."""

    sizes: tuple[int, int, int]
    transposed: bool = False
    index = ()
    fuses_gradients = False

    @property
    def T(self) -> Diagonal:
        return Diagonal(self.sizes, not self.transposed)

    def with_index(self, index: Sequence[Tensor]) -> Diagonal:
        return self

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_dense_work(x, _DENSE["backward" if self.transposed else "forward"]):
            return self._batched(x, w.mT if self.transposed else w, bias)
        y = like(x, self.sizes[0] * self.sizes[1 if self.transposed else 2])
        _kernels().block_diag_matmul(plain(x), plain(w), bias, y, self.transposed)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        if self._is_dense_work(x, _DENSE["backward"]):
            return torch.bmm(self._by_block(x).mT, self._by_block(dy))
        values = x.new_empty(self.sizes)
        _kernels().block_diag_outer(plain(x), plain(dy), values)
        return values

    def _batched(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The same by one batched product of torch's, on float32 or float64."""
        y = like(x, self.sizes[0] * w.shape[2])
        # Small results are cheaper to copy into place than to write there.
        out = self._by_block(y) if min(self.sizes[1:]) >= _IN_PLACE else None
        if bias is None:
            z = torch.bmm(self._by_block(x), w, out=out)
        else:
            z = torch.baddbmm(bias.view(self.sizes[0], 1, -1), self._by_block(x), w, out=out)
        if out is None:
            self._by_block(y).copy_(z)
        return y

    def _by_block(self, x: Tensor) -> Tensor:
        """The features of every block, [n, rows, features], where they lie."""
        n = self.sizes[0]
        return plain(x).view(-1, n, x.shape[-1] // n).transpose(0, 1)

    def _is_dense_work(self, x: Tensor, least: dict[str, int]) -> bool:
        """Blocks as large as dense layers: torch's own batched product is faster (docs/performance.md)."""
        return x.dtype in _WIDE and min(self.sizes[1:]) >= least[_isa()]

    def operator(self, name: str, *operands) -> Any:
        """The method of this name as one of torch's operators."""
        if name == "multiply":
            return torch.ops.jaxsparse.block_diag_matmul(*operands, self.transposed)
        operands = operands[::-1] if self.transposed else operands
        return torch.ops.jaxsparse.block_diag_outer(*operands, self.sizes[0])


Matrix = Sparse | Diagonal


def plain(t: Tensor) -> Tensor:
    """The same numbers as they lie in memory."""
    t = t.resolve_neg() if t.is_neg() else t
    return t if t.is_contiguous() else t.contiguous()


def like(x: Tensor, features: int) -> Tensor:
    """An empty tensor of the rows of x."""
    return x.new_empty((*x.shape[:-1], features))
