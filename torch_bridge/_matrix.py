"""Matrices that store few of their entries, and what the C++ kernels compute with them on CPU tensors."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cpu_kernels import direct

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as the kernels have them
    "relu": F.relu,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
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


@dataclasses.dataclass(eq=False, slots=True)
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
    _plain: tuple[Tensor, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def T(self) -> Sparse:
        return Sparse(self.index, self.sizes, not self.transposed)

    def with_index(self, index: Sequence[Tensor]) -> Sparse:
        if all(map(operator.is_, index, self.index)):
            return self
        return Sparse(tuple(index), self.sizes, self.transposed)

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        y, index = like(x, self.sizes[0 if self.transposed else 1]), self._plain_index()
        lines = index[2:] if self.transposed else (index[0], index[1], None)
        bias = bias if bias is None else plain(bias)
        _kernels().spmm(plain(x), plain(w), lines, bias, y, self.sizes, self.transposed, activation)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        values = x.new_empty(self.values_shape)
        _kernels().sddmm(plain(x), plain(dy), self._plain_index()[:2], values, self.sizes)
        return values

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy), the sum of dy over rows) by one call; None for those that are not wanted."""
        dy, w = plain(dy), plain(w)
        dx, dw, db = _results(dy, w, self.sizes[1 if self.transposed else 0], wanted)
        how = self._plain_index(), dx, dw, db, self.sizes, self.transposed
        _kernels().spmm_backward(plain(x), dy, w, *how)
        return dx, dw, sum_of_rows(dy) if wanted[2] and db is None else db

    def gradients(self, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy)) of single entries stored by column, in one pass over dy."""
        return self.backward(x, w, dy, (True, True, False))[:2]

    @property
    def fuses_gradients(self) -> bool:
        return not self.transposed and self.sizes[2:] == (1, 1)

    def operator(self, name: str, *operands) -> Any:
        """The method of this name as one of torch's operators."""
        index, sizes = list(self.index), list(self.sizes)
        if name == "multiply":
            *operands, activation = operands
            return torch.ops.jaxsparse.spmm(*operands, index, sizes, self.transposed, activation)
        if name == "gradients":
            return torch.ops.jaxsparse.spmm_grads(*operands, index, sizes)
        return torch.ops.jaxsparse.sddmm(*(operands[::-1] if self.transposed else operands), index, sizes)

    @property
    def values_shape(self) -> tuple[int, ...]:
        nnzb, (i, o) = self.index[1].shape[0], self.sizes[2:]
        return (nnzb,) if (i, o) == (1, 1) else (nnzb, i, o)

    def _plain_index(self) -> tuple[Tensor, ...]:
        if self._plain is None:
            self._plain = tuple(map(plain, self.index))
        return self._plain


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

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        if self._is_dense_work(x, _DENSE["backward" if self.transposed else "forward"]):
            y = self._batched(x, w.mT if self.transposed else w, bias)
            return ACTIVATIONS[activation](y) if activation else y
        y = like(x, self.sizes[0] * self.sizes[1 if self.transposed else 2])
        bias = bias if bias is None else plain(bias)
        _kernels().block_diag_matmul(plain(x), plain(w), bias, y, self.transposed, activation)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        if self._is_dense_work(x, _DENSE["backward"]):
            return torch.bmm(self._by_block(x).mT, self._by_block(dy))
        values = x.new_empty(self.sizes)
        _kernels().block_diag_outer(plain(x), plain(dy), values)
        return values

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy), the sum of dy over rows); None for those that are not wanted."""
        if self._is_dense_work(x, _DENSE["backward"]):
            dx = self.T.multiply(dy, w, None) if wanted[0] else None
            return dx, self.sample(x, dy) if wanted[1] else None, sum_of_rows(dy) if wanted[2] else None
        dy, w = plain(dy), plain(w)
        dx, dw, db = _results(dy, w, self.sizes[0] * self.sizes[2 if self.transposed else 1], wanted)
        _kernels().block_diag_backward(plain(x), dy, w, dx, dw, db, self.transposed)
        return dx, dw, sum_of_rows(dy) if wanted[2] and db is None else db

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
            *operands, activation = operands
            return torch.ops.jaxsparse.block_diag_matmul(*operands, self.transposed, activation)
        operands = operands[::-1] if self.transposed else operands
        return torch.ops.jaxsparse.block_diag_outer(*operands, self.sizes[0])


Matrix = Sparse | Diagonal


def plain(t: Tensor) -> Tensor:
    """The same numbers as they lie in memory."""
    t = t.resolve_neg() if t.is_neg() else t
    return t if t.is_contiguous() else t.contiguous()


def like(x: Tensor, features: int) -> Tensor:
    """An empty tensor of the rows of x."""
    return x.new_empty(*x.shape[:-1], features)  # twice as fast as with a tuple


def sum_of_rows(dy: Tensor) -> Tensor:
    """What a bias is given back."""
    return (dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])).sum(0)


def _results(dy: Tensor, w: Tensor, features: int, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Empty gradients for one call of a kernel, which sums rows of wide numbers only."""
    for_x, for_w, for_bias = wanted
    dx = like(dy, features) if for_x else None
    db = dy.new_empty(dy.shape[-1]) if for_bias and dy.dtype in _WIDE else None
    return dx, torch.empty_like(w) if for_w else None, db
