"""The layers of `jaxsparse.linen` for Flax NNX. The pattern is a `Pattern`, a variable that no gradient reaches.

A random pattern depends on the layer's `seed` and on how many keys the model drew before it, not on the keys:
parameters that were saved alone fit every model that the same code makes from the same streams (`nnx.Rngs(0)` and
`nnx.Rngs(params=0, dropout=1)` are not the same: in the first one dropout counts too). So the layers that `nnx.vmap`
or `nnx.scan` stacks share one pattern. With a stream "pattern", as in `nnx.Rngs(0, pattern=1)`, patterns are drawn from
it, and layers stacked under `nnx.split_rngs` get one each; then the patterns must be saved with the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.sharding import PartitionSpec

from jaxsparse import _arguments, _flax, ops
from jaxsparse.formats import states

_kernel_init = nnx.initializers.lecun_normal()
_bias_init = nnx.initializers.zeros_init()
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Pattern(nnx.Variable):
    """Holds a BlockPattern or an NMPattern: read it with `get_value()`, replace it with `set_value(...)`.

    It takes also the dict that Orbax makes of a pattern, which `BlockPattern.from_state` then checks; so do
    `nnx.update` and `nnx.merge` of a pure dict. One of another shape or block than the pattern in place is refused.
    A PartitionSpec in its place, as `nnx.get_partition_spec` puts it there, becomes one for each of its arrays.
    """

    @property
    def sharding(self):
        """A pattern with the sharding of each array in its place; of an abstract one, None."""
        return jax.tree.map(lambda array: getattr(array, "sharding", None), self.get_value())

    def create_value(self, value):
        return super().create_value(_as_pattern(value))

    def set_value(self, value, **options):
        super().set_value(_as_pattern(value, self.get_raw_value()), **options)

    def set_raw_value(self, value, **options):
        super().set_raw_value(_as_pattern(value, self.get_raw_value()), **options)

    @classmethod
    def from_metadata(cls, value, attributes):
        return super().from_metadata(_as_pattern(value), attributes)

    def copy(self, *value, **updates):
        return super().copy(*(_for_each_array(new, self.get_raw_value()) for new in value), **updates)

    replace = copy


class BlockDiagLinear(nnx.Module):
    """A linear layer whose weight is block-diagonal: `num_blocks` independent layers side by side.

        y[..., n, o] = activation(sum_i  x[..., n, i] * kernel[n, i, o]  +  bias[n, o])

    It has 1/num_blocks of the parameters and of the work of `nnx.Linear`; with one block it is that layer.

    Args:
      in_features, out_features: sizes, multiples of `num_blocks`.
      num_blocks: how many blocks, at least 1.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, rngs, kernel_metadata, bias_metadata: as in
        `nnx.Linear`; the fan-in that `kernel_init` sees is that of one block, and the kernel has three axes.
      activation: "relu", "gelu", "silu" or a function, applied last.
      backend: a back end by name; None picks the best.
    Raises:
      ValueError: if `num_blocks` does not divide both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _kernel_init,
        bias_init: Initializer = _bias_init,
        activation: ops.Activation = None,
        backend: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        i = _arguments.features_per_block("in_features", in_features, num_blocks)
        o = _arguments.features_per_block("out_features", out_features, num_blocks)
        kernel = _flax.block_diag_values(rngs.params(), kernel_init, (num_blocks, i, o), param_dtype)
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = _bias(bias_init, out_features, param_dtype, use_bias, rngs, bias_metadata)
        self.in_features, self.out_features, self.num_blocks = in_features, out_features, num_blocks
        self.use_bias, self.dtype, self.param_dtype, self.precision = use_bias, dtype, param_dtype, precision
        self.activation, self.backend = activation, backend

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, bias = promote_dtype((x, self.kernel[...], _read(self.bias)), dtype=self.dtype)
        return ops.block_diag_matmul(
            x, kernel, bias, activation=self.activation, precision=self.precision, backend=self.backend
        )


class BlockSparseLinear(nnx.Module):
    """A linear layer of whose weight only some blocks exist: parameters, gradients and moments are O(nnz).

        y = activation(x W + bias),  with the blocks of W in `kernel` [nnzb, i, o], placed by the pattern

    Give exactly one of `density`, `pattern` and `mask`. With density 1 it computes what `nnx.Linear` does.

    Args:
      in_features, out_features: sizes; neither need be a multiple of the block.
      density: the fraction of blocks that exist, at random places: drawn from `rngs.pattern()` where there is such a
        stream, else from `seed` and the number of keys that `rngs.params` gave before. At least one block.
      block: (i, o), or b for (b, b); a `pattern` brings its own.
      pattern: a BlockPattern of shape (in_features, out_features).
      mask: an (in_features, out_features) array; a block exists where any of its entries is set.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, rngs, kernel_metadata, bias_metadata: as in
        `nnx.Linear`; the fan-in that `kernel_init` sees is the mean number of stored inputs of an output.
      activation: "relu", "gelu", "silu" or a function, applied last.
      backend: a back end by name; None picks the best.
      seed: another one gives another random pattern.
    Raises:
      ValueError: if none or several of the three are given, if they are of another shape, or if the density keeps
        nothing. A mask or pattern with nothing in it is taken as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float | None = None,
        block: int | tuple[int, int] = 32,
        pattern: _flax.Pattern | None = None,
        mask: Any = None,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _kernel_init,
        bias_init: Initializer = _bias_init,
        activation: ops.Activation = None,
        backend: str | None = None,
        seed: int = 0,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        shape = (in_features, out_features)
        key = functools.partial(_pattern_key, rngs, seed)
        pattern = _flax.make_pattern(key, shape, density, block, pattern, mask)
        self.pattern = Pattern(pattern)
        kernel = _flax.sparse_values(rngs.params(), kernel_init, pattern, param_dtype)
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = _bias(bias_init, out_features, param_dtype, use_bias, rngs, bias_metadata)
        self.in_features, self.out_features = shape
        self.use_bias, self.dtype, self.param_dtype, self.precision = use_bias, dtype, param_dtype, precision
        self.activation, self.backend = activation, backend

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, bias = promote_dtype((x, self.kernel[...], _read(self.bias)), dtype=self.dtype)
        return ops.spmm(
            x,
            kernel,
            self.pattern.get_value(),
            bias,
            activation=self.activation,
            precision=self.precision,
            backend=self.backend,
        )


class SparseLinear(BlockSparseLinear):
    """`BlockSparseLinear` with a block of (1, 1): single entries exist, and `kernel` is [nnz].

    The kernel has one dimension, which many training scripts exempt from weight decay: use `jaxsparse.decay_mask`.

    Args: as for `BlockSparseLinear`, without `block`. As `pattern` an NMPattern stores n of every m inputs; the kernel
      is then [groups, n, out].
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options):
        if "block" in options:
            raise TypeError("SparseLinear stores single entries and takes no block; BlockSparseLinear does.")
        super().__init__(in_features, out_features, block=(1, 1), rngs=rngs, **options)


def _pattern_key(rngs: nnx.Rngs, seed: int) -> jax.Array:
    """From the stream "pattern" where there is one; else the same in every model that draws this layer after as many
    others: the number of keys that were taken before does not depend on the keys, and may be traced."""
    place = rngs.params.count[...]
    rngs.params()  # not used; the values drawn after it stay what they were when patterns came from here
    return rngs.pattern() if "pattern" in rngs else _flax.pattern_key(seed, place)


def _as_pattern(value: Any, before: Any = None) -> Any:
    """What a `Pattern` is given; a dict of a pattern's arrays as that pattern, which must fit the one before."""
    if not isinstance(value, Mapping):
        return value
    value = value["value"] if set(value) == {"value"} else value  # so does Orbax save a variable
    pattern = states.from_any_state(value)
    if isinstance(before, _flax.PATTERNS) and jax.tree.structure(pattern) != jax.tree.structure(before):
        raise ValueError(f"the saved {pattern} does not fit the layer's {before}: make the layer as it was saved.")
    return pattern


def _for_each_array(value: Any, pattern: Any) -> Any:
    return jax.tree.map(lambda _: value, pattern) if isinstance(value, PartitionSpec) else value


def _bias(init: Initializer, features: int, dtype: Dtype, use_bias: bool, rngs: nnx.Rngs, metadata: Mapping[str, Any]):
    return nnx.Param(init(rngs.params(), (features,), dtype), **metadata) if use_bias else nnx.data(None)


def _read(variable: nnx.Param | None) -> jax.Array | None:
    return None if variable is None else variable[...]
