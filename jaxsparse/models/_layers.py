"""The sparse layer that replaces a dense one of Flax, and what is said of those that none replaces."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import linen, nnx

from jaxsparse import nnx as sparse_nnx
from jaxsparse.models import _kept
from jaxsparse.models.rules import Rule


def nnx_layer(old: nnx.Linear, rule: Rule, rescale: bool, rngs: nnx.Rngs | None) -> Any:
    """The layer that replaces a Linear: drawn from `rngs`, or with what the rule keeps of its kernel."""
    plain = inspect.signature(nnx.Linear.__init__).parameters
    for name in ("dot_general", "promote_dtype", "preferred_element_type"):
        if getattr(old, name) is not plain[name].default:
            raise ValueError(f"it has a {name} of its own, which no sparse layer has. Leave it dense with a rule.")
    names = ("use_bias", "dtype", "param_dtype", "precision")
    options = {name: getattr(old, name) for name in names} | {"rngs": rngs or nnx.Rngs(0)}
    shape = (old.in_features, old.out_features)
    if rngs is not None:
        return _nnx_class(rule)(*shape, **drawn(rule), **options)
    values, pattern = _kept.convert(old.kernel[...], rule, rescale)
    place = {"num_blocks": rule.num_blocks} if pattern is None else {"pattern": pattern}
    layer = _nnx_class(rule)(*shape, **place, kernel_init=nnx.initializers.zeros_init(), **options)
    layer.kernel[...] = values
    if old.bias is not None:
        layer.bias[...] = old.bias[...]
    return layer


def nnx_linear(kernel: jax.Array, use_bias: bool, dtype: Any, precision: Any) -> nnx.Linear:
    """The NNX layer that computes as a Dense of Linen does."""
    options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": kernel.dtype, "precision": precision}
    zeros = nnx.initializers.zeros_init()
    linear = nnx.Linear(*kernel.shape, kernel_init=zeros, rngs=nnx.Rngs(0), **options)
    linear.kernel[...] = kernel
    return linear


def _nnx_class(rule: Rule) -> Any:
    classes = {"block_diag": "BlockDiagLinear", "block_sparse": "BlockSparseLinear", "sparse": "SparseLinear"}
    return getattr(sparse_nnx, classes[str(rule.kind)])


def drawn(rule: Rule) -> dict[str, Any]:
    """The arguments of a layer that draws its pattern itself."""
    if rule.kind == "block_diag":
        return {"num_blocks": rule.num_blocks}
    return {"density": 1.0 if rule.keep else rule.density} | (
        {"block": rule.block} if rule.kind == "block_sparse" else {}
    )


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def why_left(module: Any, dense: str) -> str:
    """Why a layer that looks dense is not replaced."""
    kind = type(module).__name__
    is_derived = isinstance(module, (nnx.Linear, linen.Dense))
    what = f"a subclass of {dense}, which may compute something else" if is_derived else f"and no {dense}"
    return f"is a {kind}, {what}. Use {dense} there, or the sparse layer itself."


def nbytes(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))
