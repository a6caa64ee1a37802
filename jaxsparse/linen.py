"""Flax Linen layers: parameters, a pattern, and one op call.

The pattern of a sparse layer is the variable `pattern` of the collection "pattern". Pass that collection to
`apply` beside "params", and give it an axis where you lift: `nn.scan(..., variable_axes={"params": 0, "pattern": 0})`.

A random pattern depends on the layer's path in the model and on its `seed`, not on the key of `init`: parameters that
were saved alone fit every model of the same code. So the layers that `nn.scan` or `nn.vmap` stacks share one pattern.
Each gets its own, drawn from a key that you give, and then the pattern must be saved with the parameters:

    nn.scan(..., variable_axes={"params": 0, "pattern": 0}, split_rngs={"params": True, "pattern": True})
    model.init({"params": key, "pattern": other_key}, x)

Initializers in `nn.with_partitioning` and the like work as for `nn.Dense`; the axes that they name are those of the
values. Every device has the whole pattern.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from jaxsparse import _arguments, _flax, ops

_lecun_normal = nn.initializers.lecun_normal()
_bias_init = nn.initializers.zeros_init()


def _kernel_init(*args, **options) -> jax.Array:
    """What `nn.Dense` draws, as a function that pickle finds by its name: so layers can be pickled."""
    return _lecun_normal(*args, **options)


class BlockDiagDense(nn.Module):
    """A dense layer whose weight is block-diagonal: `num_blocks` independent layers side by side.

        y[..., n, o] = activation(sum_i  x[..., n, i] * kernel[n, i, o]  +  bias[n, o])

    It has 1/num_blocks of the parameters and of the work of `nn.Dense(features)`; with one block it is that layer.

    Attributes:
      features: number of outputs, a multiple of `num_blocks`; so must the inputs be.
      num_blocks: how many blocks, at least 1.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in `nn.Dense`; the fan-in that
        `kernel_init` sees is that of one block.
      activation: "relu", "gelu", "silu" or a function, applied last.
      backend: a back end by name; None picks the best.

    The kernel has three dimensions: docs/optimizers.md says what Muon makes of it.

    Raises ValueError if `num_blocks` does not divide the inputs or `features`.
    """

    features: int
    num_blocks: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = _kernel_init
    bias_init: Initializer = _bias_init
    activation: ops.Activation = None
    backend: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        i = _arguments.features_per_block("inputs", jnp.shape(x)[-1], self.num_blocks)
        o = _arguments.features_per_block("features", self.features, self.num_blocks)
        shape = (self.num_blocks, i, o)
        kernel = self.param("kernel", _flax.block_diag_values, self.kernel_init, shape, self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, _bias(self), dtype=self.dtype)
        return ops.block_diag_matmul(
            x, kernel, bias, activation=self.activation, precision=self.precision, backend=self.backend
        )


class BlockSparseDense(nn.Module):
    """A dense layer of whose weight only some blocks exist: parameters, gradients and moments are O(nnz).

        y = activation(x W + bias),  with the blocks of W in `kernel` [nnzb, i, o], placed by the pattern

    Give exactly one of `density`, `pattern` and `mask`. With density 1 it computes what `nn.Dense` does.

    Attributes:
      features: number of outputs; no size need be a multiple of the block.
      density: the fraction of blocks that exist, at random places: drawn from the stream "pattern" where `init` is
        given one, else from `seed` and the layer's path, the same for every key of `init`. At least one block.
      block: (i, o), or b for (b, b); a `pattern` brings its own.
      pattern: a BlockPattern of shape (in, features).
      mask: an (in, features) array; a block exists where any of its entries is set.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in `nn.Dense`; the fan-in that
        `kernel_init` sees is the mean number of stored inputs of an output.
      activation: "relu", "gelu", "silu" or a function, applied last.
      backend: a back end by name; None picks the best.
      seed: another one gives another random pattern, to all layers at this path.

    The kernel has three dimensions: docs/optimizers.md says what Muon makes of it.

    Raises ValueError if none or several of the three are given, if they are of another shape, or if the density keeps
    nothing. A mask or pattern with nothing in it is taken as it is.
    """

    features: int
    density: float | None = None
    block: int | tuple[int, int] = 32
    pattern: _flax.Pattern | None = None
    mask: Any = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = _kernel_init
    bias_init: Initializer = _bias_init
    activation: ops.Activation = None
    backend: str | None = None
    seed: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _sparse(self, x, self.block)


class SparseDense(nn.Module):
    """A dense layer of whose weight only single entries exist: parameters, gradients and moments are O(nnz).

        y = activation(x W + bias),  with the entries of W in `kernel` [nnz], placed by the pattern

    Give exactly one of `density`, `pattern` and `mask`. With density 1 it computes what `nn.Dense` does.

    Attributes:
      features: number of outputs.
      density: the fraction of entries that exist, at random places, as in `BlockSparseDense`. At least one entry.
      pattern: a BlockPattern, or an NMPattern for n of every m inputs, of shape (in, features).
      mask: an (in, features) array; an entry exists where it is set. Arrays make a module unhashable: where it must be
        a static argument or a key, give the pattern instead, BlockPattern.from_mask(mask).
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init, activation, backend, seed: as in
        `BlockSparseDense`.

    The kernel has one dimension, which many training scripts exempt from weight decay: use `jaxsparse.decay_mask`.

    Raises ValueError if none or several of the three are given, if they are of another shape, or if the density keeps
    nothing. A mask or pattern with nothing in it is taken as it is.
    """

    features: int
    density: float | None = None
    pattern: _flax.Pattern | None = None
    mask: Any = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = _kernel_init
    bias_init: Initializer = _bias_init
    activation: ops.Activation = None
    backend: str | None = None
    seed: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _sparse(self, x, (1, 1))


def _sparse(layer: BlockSparseDense | SparseDense, x: jax.Array, block) -> jax.Array:
    shape = (jnp.shape(x)[-1], layer.features)

    def draw() -> _flax.Pattern:
        key = functools.partial(_pattern_key, layer)
        return _flax.make_pattern(key, shape, layer.density, block, layer.pattern, layer.mask)

    if not layer.is_initializing() and not layer.has_variable("pattern", "pattern"):
        name = f" {layer.name}" if layer.name else ""
        raise ValueError(
            f"{type(layer).__name__}{name} found no pattern: pass the collection that init made "
            "beside the parameters, model.apply({'params': params, 'pattern': variables['pattern']}, x)."
        )
    pattern = layer.variable("pattern", "pattern", draw).value
    _arguments.check_fits(pattern, shape, kinds=_flax.PATTERNS)
    kernel = layer.param("kernel", _flax.sparse_values, layer.kernel_init, pattern, layer.param_dtype)
    x, kernel, bias = promote_dtype(x, kernel, _bias(layer), dtype=layer.dtype)
    return ops.spmm(
        x, kernel, pattern, bias, activation=layer.activation, precision=layer.precision, backend=layer.backend
    )


def _pattern_key(layer: BlockSparseDense | SparseDense) -> jax.Array:
    """From the stream "pattern" where the caller gave one; else the same in every model with a layer at this path."""
    layer.make_rng("params")  # not used; the values drawn after it stay what they were when patterns came from here
    if layer.has_rng("pattern"):
        return layer.make_rng("pattern")
    return _flax.pattern_key(layer.seed, zlib.crc32("/".join(layer.path).encode()))


def _bias(layer) -> jax.Array | None:
    return layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype) if layer.use_bias else None
