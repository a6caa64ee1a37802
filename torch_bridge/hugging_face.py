"""Sparse layers in models of transformers: `from_pretrained` and `save_pretrained` know them once this is imported.

transformers loads a checkpoint whose layers are not its own through a *quantizer*, which is found by a name in
`config.json`. The one registered here puts sparse layers in the place of linear ones before weights are loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from jaxsparse._sizes import check_sizes, grid_of
from jaxsparse.models.rules import Rules, parse
from torch_bridge import _linear, patch
from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear

_METHOD = "jaxsparse"
densify = patch.densify


class SparseConfig(QuantizationConfigMixin):
    """What `config.json` says of a sparse model, and what makes a dense one sparse while it is loaded.

        import torch_bridge.hugging_face as sparse
        config = sparse.SparseConfig([(r".*\\.mlp\\..*", {"kind": "block_sparse", "density": 0.25})])
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)  # sparse, with its patterns

    Args:
      rules: as for `torch_bridge.sparsify`; of a dense checkpoint.
      layers: of a sparse checkpoint, what each layer is: {path: {"kind": "sparse", "nnzb": 419}}, a block-sparse one
        with "block": [i, o], a block-diagonal one with "num_blocks" alone; "activation" where a layer has one.
    """

    def __init__(self, rules: Rules = (), layers: Mapping[str, Mapping[str, Any]] | None = None, **kwargs):
        self.quant_method: Any = _METHOD
        self.rules = [[pattern, options if options is None else dict(options)] for pattern, options in rules]
        self.layers = {path: dict(layer) for path, layer in (layers or {}).items()}
        if self.rules:
            parse([(pattern, options) for pattern, options in self.rules])


class SparseQuantizer(HfQuantizer):
    """Puts sparse layers into a model: before a sparse checkpoint is loaded, or after a dense one was."""

    quantization_config: SparseConfig

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs):
        if self.pre_quantized:
            for path, layer in self.quantization_config.layers.items():
                _put_in(model, path, layer)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs):
        if not self.pre_quantized:
            patch.sparsify(model, [(pattern, options) for pattern, options in self.quantization_config.rules])
            self.quantization_config.layers = layers_of(model)
        model.is_quantized = False  # nothing is: casts and training go on as for any model
        return model

    def get_state_dict_and_metadata(self, model):
        """Called before the config is written: layers may have come, gone or grown since."""
        self.quantization_config.layers = layers_of(model)
        if self.quantization_config.layers:
            model.config.quantization_config = self.quantization_config
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return None, {}

    def _dequantize(self, model, dtype=None):
        densify(model)
        return model if dtype is None else model.to(dtype)


register_quantization_config(_METHOD)(SparseConfig)
register_quantizer(_METHOD)(SparseQuantizer)


def mark(model: nn.Module) -> None:
    """Makes `save_pretrained` of a model, and of the models of transformers in it, write what `from_pretrained` needs.

    `torch_bridge.sparsify` does so with the model that it is given. Call it for the model that you save where you
    patched a part of it, or put sparse layers in by hand. A model that has another quantizer keeps that, with a
    warning: transformers saves by one of them, and weights that are quantized can't be read without theirs.
    """
    for m in model.modules():
        if not isinstance(m, PreTrainedModel):
            continue
        other = vars(m).get("hf_quantizer")
        if isinstance(other, SparseQuantizer | None):
            vars(m)["hf_quantizer"] = SparseQuantizer(SparseConfig(), pre_quantized=True)
        else:
            warnings.warn(_OTHER.format(model=type(m).__name__, other=type(other).__name__), stacklevel=2)


_OTHER = (
    "this {model} has a {other}, and transformers writes the config of one quantizer only: save_pretrained will not "
    "say which layers are sparse, and from_pretrained will not load them. Save model.state_dict(), and load it into "
    "a model that the same rules made sparse."
)


def layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each sparse layer of a model is, as in `SparseConfig`."""
    found = {}
    for path, layer in _sparse_layers(model):
        if isinstance(layer, BlockDiagLinear):
            found[path] = {"kind": "block_diag", "num_blocks": layer.num_blocks}
        else:
            kind = "sparse" if isinstance(layer, SparseLinear) else "block_sparse"
            found[path] = {"kind": kind, "nnzb": layer.pattern.nnzb, "block": list(layer.pattern.block)}
        if layer.activation is not None:
            found[path]["activation"] = layer.activation
    return found


def _sparse_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(p, m) for p, m in model.named_modules() if isinstance(m, (BlockDiagLinear, BlockSparseLinear))]


def _put_in(model: Any, path: str, layer: Mapping[str, Any]) -> None:
    """An empty sparse layer, on the meta device, in the place of a linear one; nothing where a model lacks it.

    The base model may be loaded of a model with a head, and the other way round. What is missing then, or is too much,
    transformers says itself.
    """
    prefix = f"{model.base_model_prefix}."
    paths = [p for p in (path, path.removeprefix(prefix), prefix + path) if _has(model, p)]
    if not paths:
        return
    parent, _, name = paths[0].rpartition(".")
    try:
        new = _empty(_linear.read(model.get_submodule(paths[0])), **layer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has a sparse layer at {path}, which can't be made: {error}") from None
    setattr(model.get_submodule(parent), name, new)


def _empty(
    old: _linear.Linear, kind: str, nnzb: int = 0, block=(1, 1), num_blocks: int = 0, activation: str | None = None
) -> nn.Module:
    options = {"activation": activation, **old.options}
    if kind == "block_diag":
        return BlockDiagLinear(*old.shape, num_blocks, **options)
    grid = grid_of(*check_sizes(old.shape, block))
    options["density"] = nnzb / (grid[0] * grid[1])
    if kind == "sparse":
        return SparseLinear(*old.shape, **options)
    return BlockSparseLinear(*old.shape, block=tuple(block), **options)


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())
