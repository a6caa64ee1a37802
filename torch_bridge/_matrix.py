"""Matrices that store few of their entries, and what the C++ kernels compute with them on CPU tensors."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.nn import functional as F

from cpu_kernels import direct
from jaxsparse._sizes import is_unstructured, values_shape
from torch_bridge._memory import in_large_pages
from torch_bridge._narrow import Narrow

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as the kernels have them
    "relu": F.relu,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_WIDE = (torch.float32, torch.float64)
# Of one row, where entries come from behind the second-level cache and are half index: half as much of that in 16 bits.
_WORTH_NARROWING = 2**18
_IN_PLACE = 1024  # features of a block from which on its result is written where it belongs
WHY_NOT = direct.why_not(torch)  # the reason why CPU tensors can't be multiplied here without JAX, if there is one


@functools.cache
def _isa() -> str:
    return direct.isa()


@functools.cache
def _prefers_dense(product: str, sizes: tuple[int, int, int]) -> bool:
    """Whether torch's own batched product is the faster "multiply" or "sample" of `sizes` = (n, i, o).

    As raced for 8 to 1024 rows, by AVX-512 and by AVX2, which agreed (docs/performance.md). Kernels read and write
    blocks where they lie; torch's product of large blocks uses the cache better, and its weight gradient, for which
    nothing has to be moved, wins from smaller sizes on.
    """
    n, features = sizes[0], min(sizes[1:])
    if _isa() == "portable":
        return features >= 16
    if product == "sample":
        return features >= 128
    return features >= (128 if n == 1 else 256 if n < 8 else 512)


@functools.cache
def _is_torchs(sizes: tuple[int, int, int]) -> bool:
    """Whether a layer of `sizes` = (n, i, o) is faster by torch's own operators, all that Python does for a product of
    ours counted, and the node in the graph.

    From `_IN_PLACE` on it pays to write results where they belong and in large pages, which such a node does.
    """
    return 128 <= min(sizes[1:]) < _IN_PLACE


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
    _narrow: Narrow | None = dataclasses.field(default=None, init=False, repr=False)
    _lone_rows: int = dataclasses.field(default=0, init=False, repr=False)

    @property
    def T(self) -> Sparse:
        return Sparse(self.index, self.sizes, not self.transposed)

    def with_index(self, index: Sequence[Tensor]) -> Sparse:
        if all(map(operator.is_, index, self.index)):
            return self
        return Sparse(tuple(index), self.sizes, self.transposed)

    def multiply(self, x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        y, index = in_large_pages(like(x, self.sizes[0 if self.transposed else 1])), self._plain_index()
        if self.transposed:
            lines = index[2:]
        elif x.numel() == self.sizes[0] and self._narrows():
            lines = index[0], self._narrow_index(), None
        else:
            lines = index[0], index[1], None
        bias = bias if bias is None else plain(bias)
        _kernels().spmm(plain(x), plain(w), lines, bias, y, self.sizes, self.transposed, activation)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        values = in_large_pages(x.new_empty(self.values_shape))
        _kernels().sddmm(plain(x), plain(dy), self._plain_index()[:2], values, self.sizes)
        return values

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy), the sum of dy over rows) by one call; None for those that are not wanted."""
        x, dy, w = plain(x), plain(dy), plain(w)
        for_x, for_w, for_bias = wanted
        is_wide = dy.dtype in _WIDE
        dx, dw, db = _results(x, w, dy, (for_x, for_w, for_bias and is_wide))
        _kernels().spmm_backward(x, dy, w, self._plain_index(), dx, dw, db, self.sizes, self.transposed)
        return dx, dw, db if is_wide or not for_bias else sum_of_rows(dy)

    def gradients(self, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy)) of single entries stored by column, in one pass over dy."""
        return self.backward(x, w, dy, (True, True, False))[:2]

    @property
    def fuses_gradients(self) -> bool:
        return not self.transposed and is_unstructured(self.sizes[2:])

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
        return values_shape(self.index[1].shape[0], self.sizes[2:])

    def _plain_index(self) -> tuple[Tensor, ...]:
        if self._plain is None:
            self._plain = tuple([plain(unwrap_if_dead(t)) for t in self.index])  # a transform may have ended
        return self._plain

    def _narrows(self) -> bool:
        """Whether a product of one row is to read the index in 16 bits: from the second one on, so that a matrix that
        is made for a single call does not."""
        self._lone_rows += 1
        fits = is_unstructured(self.sizes[2:]) and self.sizes[0] <= 2**16
        return fits and self._lone_rows > 1 and self.index[1].shape[0] >= _WORTH_NARROWING

    def _narrow_index(self) -> Tensor:
        if self._narrow is None:
            self._narrow = Narrow(self._plain_index()[1], self.sizes[0])
        return self._narrow()


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
        if self._is_dense("multiply", x):
            y = self._batched(x, w.mT if self.transposed else w, bias)
            return ACTIVATIONS[activation](y) if activation else y
        y = in_large_pages(like(x, self.sizes[0] * self.sizes[1 if self.transposed else 2]))
        bias = bias if bias is None else plain(bias)
        _kernels().block_diag_matmul(plain(x), plain(w), bias, y, self.transposed, activation)
        return y

    def sample(self, x: Tensor, dy: Tensor) -> Tensor:
        x, dy = (dy, x) if self.transposed else (x, dy)
        if self._is_dense("sample", x):
            out = in_large_pages(x.new_empty(self.sizes))
            return torch.bmm(self._by_block(x).mT, self._by_block(dy), out=out)
        values = x.new_empty(self.sizes)
        _kernels().block_diag_outer(plain(x), plain(dy), values)
        return values

    def backward(self, x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """(dy W^T, sample(x, dy), the sum of dy over rows); None for those that are not wanted."""
        for_x, for_w, for_bias = wanted
        dy, dx, dw, db, is_wide = plain(dy), None, None, None, dy.dtype in _WIDE
        if for_x and self._is_dense("multiply", x):
            dx, for_x = self.T.multiply(dy, w, None), False
        if for_w and self._is_dense("sample", x):
            dw, for_w = self.sample(x, dy), False
        if for_bias and not (for_x or for_w):
            db, for_bias = sum_of_rows(dy), False
        if for_x or for_w:
            x, w = plain(x), plain(w)
            own_dx, own_dw, db = _results(x, w, dy, (for_x, for_w, for_bias and is_wide))
            _kernels().block_diag_backward(x, dy, w, own_dx, own_dw, db, self.transposed)
            dx, dw = own_dx if for_x else dx, own_dw if for_w else dw
        return dx, dw, sum_of_rows(dy) if for_bias and not is_wide else db

    def is_torchs(self, x: Tensor) -> bool:
        """Whether torch's own operators are the best there is in both directions, and need no node of ours."""
        return x.dtype in _WIDE and _is_torchs(self.sizes)

    def by_torch(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """x W + bias by operators that torch differentiates itself."""
        n, w = self.sizes[0], w.mT if self.transposed else w
        if n == 1:
            w = w.squeeze(0)
            if x.ndim == 2:
                return x @ w if bias is None else torch.addmm(bias, x, w)
            rows = x.reshape(-1, x.shape[-1])
            y = rows @ w if bias is None else torch.addmm(bias, rows, w)
        else:
            blocks = x.reshape(-1, n, x.shape[-1] // n).transpose(0, 1)
            y = torch.bmm(blocks, w) if bias is None else torch.baddbmm(bias.view(n, 1, -1), blocks, w)
            y = y.transpose(0, 1)
        return y.reshape(*x.shape[:-1], n * w.shape[-1])

    def _batched(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The same by one batched product of torch's, on float32 or float64."""
        y = in_large_pages(like(x, self.sizes[0] * w.shape[2]))
        # Small results are cheaper to copy into place than to write there.
        out = self._by_block(y) if self.sizes[0] == 1 or min(self.sizes[1:]) >= _IN_PLACE else None
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

    def _is_dense(self, product: str, x: Tensor) -> bool:
        return x.dtype in _WIDE and _prefers_dense(product, self.sizes)

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
    t = torch.zeros_like(t) if t._is_zerotensor() else t  # a tangent for which nothing was written yet
    return t if t.is_contiguous() else t.contiguous()


def like(x: Tensor, features: int) -> Tensor:
    """An empty tensor of the rows of x, which may have shapes alone."""
    if x.ndim == 2:
        return x.new_empty(x.shape[0], features)  # twice as fast as with a tuple or a slice
    return x.new_empty(*x.shape[:-1], features)


def sum_of_rows(dy: Tensor) -> Tensor:
    """What a bias is given back."""
    return (dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])).sum(0)


def _results(x: Tensor, w: Tensor, dy: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Empty gradients of plain operands for one call of a kernel, which sums rows of wide numbers only."""
    for_x, for_w, for_bias = wanted
    db = dy.new_empty(dy.shape[-1]) if for_bias else None
    dw = in_large_pages(torch.empty_like(w)) if for_w else None
    dx = in_large_pages(torch.empty_like(x)) if for_x else None
    return dx, dw, db
