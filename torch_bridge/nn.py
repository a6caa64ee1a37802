"""Sparse linear layers for PyTorch. Their products on CPU tensors need no JAX; all others are computed in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from jaxsparse._arguments import features_per_block
from jaxsparse._sizes import is_unstructured
from torch_bridge import _dense, _draw, _index, _layer, _linear, _stored
from torch_bridge._matrix import Diagonal, Sparse
from torch_bridge._product import KEPT, Product, through_jax
from torch_bridge._stored import Stored
from torch_bridge._views import Views
from torch_bridge._watch import refuse_script

if TYPE_CHECKING:
    import jax

    from jaxsparse.formats import BlockPattern


class BlockDiagLinear(nn.Module):
    """A linear layer whose weight is block-diagonal: `num_blocks` independent layers side by side.

        y[..., n, o] = activation(sum_i  x[..., n, i] * weight[n, i, o]  +  bias[n, o])

    It has 1/num_blocks of the parameters and of the work of `torch.nn.Linear`; with one block it is that
    layer.

    Args:
      in_features, out_features: sizes, multiples of `num_blocks`.
      num_blocks: how many blocks, at least 1.
      bias, device, dtype: as in `torch.nn.Linear`.
      precision: as in `jax.lax.dot`.
      backend: a back end by name, which then runs or raises; None picks the best.
      activation: "relu", "gelu" (tanh form), "silu" or None. Where no gradient is asked for, the kernel applies it.
    Attributes:
      weight: [num_blocks, in_features / num_blocks, out_features / num_blocks], each block (in, out). Drawn,
        like the bias, from U(-k, k) with k = 1 / sqrt(in_features / num_blocks): what `torch.nn.Linear` does
        for each block.
      bias: [out_features], or None.
    Raises:
      ValueError: if `num_blocks` does not divide both sizes, for an unknown activation, and in a call whose input
        has another dtype than the weight (outside torch.autocast, which is followed as `torch.nn.Linear` does) or
        other features.
    Source: the block-diagonal factors of Monarch, Dao et al. 2022, arXiv:2204.00595.
    """

    weight: Tensor
    bias: Tensor | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        *,
        precision: jax.lax.PrecisionLike = None,
        backend: str | None = None,
        activation: str | None = None,
    ):
        super().__init__()
        self.activation = _layer.known(activation)
        i = features_per_block("in_features", in_features, num_blocks)
        o = features_per_block("out_features", out_features, num_blocks)
        self.in_features, self.out_features, self.num_blocks = in_features, out_features, num_blocks
        self._matrix = Diagonal((num_blocks, i, o))
        self._product = Product(self._matrix.sizes, precision=precision, backend=backend)
        self._through_jax = through_jax(self._product)
        self._views = Views(KEPT)
        _layer.make_parameters(self, (num_blocks, i, o), out_features if bias else None, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, from torch's generator."""
        _layer.draw_parameters(self, self.in_features // self.num_blocks)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_blocks: int, *, rescale: bool = False, **options) -> BlockDiagLinear:
        """The diagonal blocks of a `torch.nn.Linear`, with its bias, dtype, device and mode; the rest is dropped.

        Args:
          linear: or a `Conv1D` of transformers. Weights that hooks or parametrizations compute are taken as the next
            forward pass would have them, and become parameters.
          rescale: multiply the blocks, so that the weight keeps its Frobenius norm.
          options: `precision`, `backend` and `activation`.
        Raises:
          TypeError, ValueError: for a layer that need not compute x W + b, or whose weight is not known.
        """
        dense = _linear.read(linear)
        w = dense.weight.value
        layer = cls(*dense.shape, num_blocks, **dense.options, **options)
        return _linear.fill(layer, dense, _dense.gather_diagonal(w, num_blocks), rescale)

    def to_linear(self) -> nn.Linear:
        """A `torch.nn.Linear` that computes the same before any activation, zeros stored as zeros."""
        return _linear.to_dense(self, lambda blocks: torch.block_diag(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        return _layer.multiply_diagonal(self, x, self._matrix)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_blocks={self.num_blocks}, bias={self.bias is not None}{_layer.shown(self.activation)}"
        )


class BlockSparseLinear(nn.Module):
    """A linear layer of whose weight only some blocks exist: parameters, gradients and moments are O(nnz).

        y = activation(x W + bias),  with the blocks of W (in, out) in `weight`, placed by the pattern

    Give exactly one of `density`, `pattern` and `mask`. With density 1 it computes what `torch.nn.Linear`
    does. The pattern is in buffers: `state_dict` carries it, and it loads into any layer of the same sizes
    and count. A layer made on the meta device gets its pattern, too, when a state_dict is loaded, or by
    `reset_parameters`. `_index.Guard` says when the buffers are checked.

    Args:
      in_features, out_features: sizes; neither need be a multiple of the block.
      density: the fraction of blocks that exist, at random places drawn from torch's generator.
      block: (i, o), inputs by outputs, or b for (b, b); a `pattern` brings its own.
      pattern: a jaxsparse.BlockPattern of shape (in_features, out_features).
      mask: an (out_features, in_features) tensor or array, elementwise, as the weight of `torch.nn.Linear`; a
        block exists where any of its entries is set.
      bias, device, dtype: as in `torch.nn.Linear`.
      precision: as in `jax.lax.dot`.
      backend: a back end by name, which then runs or raises; None picks the best.
      activation: "relu", "gelu" (tanh form), "silu" or None. Where no gradient is asked for, the kernel applies it.
    Attributes:
      weight: [nnzb, i, o] ([nnz] for a block of (1, 1)), in the order of the pattern. Drawn, like the bias,
        from U(-k, k) with k = 1 / sqrt(fan_in), fan_in being the mean number of stored inputs of an output.
      bias: [out_features], or None.
    Raises:
      ValueError: if none or several of the three are given, or they are of another shape; for an unknown activation;
        and in a call whose
        input has another dtype than the weight (outside torch.autocast) or other features, whose buffers hold no
        whole pattern, or whose weight was loaded without its pattern.
    """

    weight: Tensor
    bias: Tensor | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float | None = None,
        block: int | tuple[int, int] = 32,
        *,
        pattern: BlockPattern | None = None,
        mask: Any = None,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        precision: jax.lax.PrecisionLike = None,
        backend: str | None = None,
        activation: str | None = None,
    ):
        super().__init__()
        self.activation = _layer.known(activation)
        stored = _stored.asked_for((in_features, out_features), density, block, pattern, mask)
        self.in_features, self.out_features = stored.shape
        self._product = Product(stored.values_shape, stored.shape, stored.block, stored.transposed, precision, backend)
        self._through_jax = through_jax(self._product)
        self._views = Views(KEPT)
        _layer.make_parameters(self, stored.values_shape, out_features if bias else None, device, dtype)
        for name, t in zip(_index.NAMES, stored.index, strict=True):
            self.register_buffer(name, t.to(self.weight.device))
        self.register_buffer("sizes", torch.tensor(self._product.sizes, dtype=torch.int32).to(self.weight.device))
        lost = density is not None and self.weight.is_meta  # reset_parameters draws another
        known = None if lost else _index.Record.of([t.numpy() for t in stored.index[:2]], stored.grid)
        self._guard = _index.Guard(self._product.sizes, stored.grid, known)
        self._matrix: Sparse | None = None
        if not isinstance(pattern, Stored):  # by `from_linear`, which fills it
            self.reset_parameters()

    @property
    def pattern(self) -> BlockPattern:
        """A copy of the pattern, as the functions of jaxsparse take it."""
        from torch_bridge import _in_jax

        return _in_jax.copied_pattern(self._product, self._index())

    @property
    def density(self) -> float:
        """The fraction of blocks that exist."""
        (i, o), (rows, cols) = self._product.block, self._product.shape
        return self.weight.shape[0] / (-(-rows // i) * -(-cols // o))

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, from torch's generator. The pattern stays.

        Where there is none, as on memory that `to_empty` made of a layer from the meta device, it is drawn as well, or,
        if the layer was made with a `pattern` or a `mask`, put back.
        """
        if not self.order.is_meta and not self._guard.put_back(self._buffers):
            self._guard.fill(self._buffers, _draw.random_index(self._guard.grid, self.weight.shape[0]))
        _layer.draw_parameters(self, max(1, round(self.density * self.in_features)))
        (rows, cols, *block), _ = self._product.stored
        inside = None if self.weight.is_meta else _draw.inside(self._index(), (rows, cols), (block[0], block[1]))
        if inside is not None:  # what lies beyond the matrix is zero, and stays so: it gets no gradient
            with torch.no_grad():
                self.weight.mul_(inside.to(self.weight.device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        *,
        block: int | tuple[int, int] = 32,
        pattern: BlockPattern | None = None,
        mask: Any = None,
        rescale: bool = False,
        **options,
    ) -> Self:
        """The blocks of largest L2 norm of a `torch.nn.Linear`, with its bias, dtype, device and mode.

        Args:
          linear: or a `Conv1D` of transformers. Weights that hooks or parametrizations compute are taken as the next
            forward pass would have them, and become parameters.
          density, block, pattern, mask: as for the class, but that `density` keeps the largest blocks.
          rescale: multiply the blocks, so that the weight keeps its Frobenius norm, and outputs about their scale.
          options: `precision`, `backend` and `activation`.
        Raises:
          TypeError, ValueError: for a layer that need not compute x W + b, or whose weight is not known.
        """
        dense = _linear.read(linear)
        w = dense.weight.value
        if w.is_meta:
            raise ValueError(
                "the weight is on the meta device and has no values to choose from: use to_empty and load."
            )
        stored = _stored.chosen(w, density, block, pattern, mask)
        layer = cls(*dense.shape, pattern=stored, **dense.options, **options)  # pyright: ignore[reportArgumentType]
        return _linear.fill(layer, dense, _dense.gather(w, stored), rescale)

    def to_linear(self) -> nn.Linear:
        """A `torch.nn.Linear` that computes the same before any activation, zeros stored as zeros."""
        return _linear.to_dense(self, lambda values: _dense.scatter(values, self._places()))

    @classmethod
    def from_sparse(cls, weight: Tensor, bias: Tensor | None = None, **options) -> Self:
        """The layer with the entries of an (out, in) sparse tensor, or the blocks of a BSR or BSC one, as its weight.

        Args:
          weight: of any of torch's sparse layouts, or semi-structured (2:4) as CUTLASS has it.
          bias: [out], or None for a layer without.
          options: `precision`, `backend` and `activation`.
        Raises:
          ValueError: for another layout, for blocks where the layer stores single entries, and for indices or metadata
            that are no matrix.
        """
        from torch_bridge import _compressed

        pattern, values = _compressed.split(weight)
        like = {"bias": bias is not None, "device": values.device, "dtype": values.dtype}
        layer = cls(*pattern.shape, pattern=pattern, **like, **options)
        with torch.no_grad():
            layer.weight.copy_(values)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def to_sparse(self) -> Tensor:
        """A copy of the weight as an (out, in) tensor: BSR, or CSR where the block is (1, 1).

        Raises:
          ValueError: if the blocks do not divide the matrix.
        """
        from torch_bridge import _compressed

        return _compressed.join(self.pattern, _linear.read_sparse(self).weight.value.clone())

    def to_semi_structured(self) -> Tensor:
        """A copy of the weight as torch's (out, in) semi-structured tensor, with which a GPU multiplies.

        Raises:
          ValueError: where more than 2 of 4 neighbouring inputs, of float32 1 of 2, are not zero.
          RuntimeError: torch's own, for sizes or dtypes that it has no such tensors of.
        """
        from torch_bridge import _compressed

        return _compressed.pack(self.to_linear().weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        index = self._index()
        return _layer.multiply(self, x, index, self._matrix_of(index))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, density={self.density:.4g}, "
            f"block={self._product.block}, bias={self.bias is not None}{_layer.shown(self.activation)}"
        )

    def _index(self) -> tuple[Tensor, ...]:
        return self._guard(self._buffers)

    def _places(self) -> Stored:
        return Stored(self._index(), self._product.shape, self._product.block, self._product.transposed)

    def _matrix_of(self, index: tuple[Tensor, ...]) -> Sparse:
        """The matrix of these buffers, which are the same from call to call."""
        if torch.compiler.is_compiling():
            return Sparse(index, *self._product.stored)
        kept = self._matrix
        if kept is None or kept.index is not index:
            kept = self._matrix = Sparse(index, *self._product.stored)
        return kept

    def __getstate__(self) -> dict[str, Any]:
        self._guard.settle(self._buffers)  # a copy may be blurred by averages before its first call
        return {**self.__dict__, "_matrix": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._guard.settle(self._buffers, saving=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own = {id(t) for t in (*self.parameters(), *self.buffers())}  # with which some loaders fill up what was saved
        saved = {key.removeprefix(prefix): t for key, t in state_dict.items() if id(t) not in own}
        here = {name: getattr(self, name).shape for name in ("weight", "sizes", *_index.NAMES)}
        misfit = self._guard.misfit(saved, here)
        if misfit:  # all or nothing: half of another pattern would multiply wrongly
            error_msgs.append(f"{prefix or 'this layer'}: {misfit}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._guard.loaded(self._buffers, saved)


class SparseLinear(BlockSparseLinear):
    """`BlockSparseLinear` with a block of (1, 1): single entries exist, and `weight` is [nnz].

    The weight has one dimension, which many training scripts exempt from weight decay: use
    `torch_bridge.parameter_groups`.

    Args: as for `BlockSparseLinear`, without `block`.
    """

    def __init__(self, in_features: int, out_features: int, density: float | None = None, *, device=None, **options):
        if "block" in options:
            raise TypeError("SparseLinear stores single entries and takes no block; BlockSparseLinear does.")
        pattern = options.get("pattern")
        blocks = getattr(pattern, "block", (1, 1))
        if not is_unstructured(blocks):
            raise ValueError(f"the pattern has blocks of {blocks}, not single entries: use BlockSparseLinear.")
        super().__init__(in_features, out_features, density, (1, 1), device=device, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, density: float | None = None, *, block=(1, 1), **options) -> Self:
        return super().from_linear(linear, density, block=block, **options)

    def extra_repr(self) -> str:
        return super().extra_repr().replace(f"block={self._product.block}, ", "")
