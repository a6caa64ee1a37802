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
# Features of a block from which on torch's own product is faster, by the kernels' instruction set.
_DENSE_FROM = {"avx512": 512, "avx2": 256, "portable": 64}
WHY_NOT = direct.why_not(torch)  # the reason why CPU tensors can't be multiplied here without JAX, if there is one


@functools.cache
def _dense_from() -> int:
    return _DENSE_FROM[direct.isa()]


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
        n, i, o = self.sizes
        y = like(x, n * (i if self.transposed else o))
        if not self._is_dense_work(x):
            _kernels().block_diag_matmul(plain(x), plain(w), bias, y, self.transposed)
            return y
        blocks = (w.mT if self.transposed else w).unbind()
        parts = zip(self._slices(x), blocks, self._slices(y), strict=True)
        if bias is None:
            for x_n, w_n, y_n in parts:
                torch.mm(x_n, w_n, out=y_n)
        else:
            for (x_n, w_n, y_n), b in zip(parts, bias.view(n, -1).unbind(), strict=True):
                torch.addmm(b, x_n, w_n, out=y_n)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        values = x.new_empty(self.sizes)
        if not self._is_dense_work(x):
            _kernels().block_diag_outer(plain(x), plain(dy), values)
            return values
        for x_n, dy_n, w_n in zip(self._slices(x), self._slices(dy), values.unbind(), strict=True):
            torch.mm(x_n.mT, dy_n, out=w_n)
        return values

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """The features of every block, [rows, features], where they lie."""
        n = self.sizes[0]
        return plain(x).view(-1, n, x.shape[-1] // n).unbind(1)

    def _is_dense_work(self, x: Tensor) -> bool:
        """Blocks as large as dense layers: torch's own product is faster (docs/performance.md)."""
        return x.dtype in _WIDE and min(self.sizes[1:]) >= _dense_from()

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
