"""LoRA adapters of peft on frozen sparse layers."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from torch_bridge.nn import BlockDiagLinear, BlockSparseLinear, SparseLinear


def register(config: LoraConfig) -> LoraConfig:
    """Lets a LoRA configuration of peft take sparse layers as targets, beside those that it takes anyway.

        from torch_bridge import lora
        model = get_peft_model(model, lora.register(LoraConfig(target_modules=["up_proj"])))

    peft saves no such entry. To load adapters, read their configuration first:

        PeftModel.from_pretrained(model, path, config=lora.register(LoraConfig.from_pretrained(path)))

    Args:
      config: is changed, and returned. Plain LoRA, with its initialisations, ranks, rsLoRA and bias, is what sparse
        layers know; peft refuses DoRA and other variants by name.
    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; seen with peft 0.21.2.
    """
    config._register_custom_module(dict.fromkeys((BlockDiagLinear, BlockSparseLinear, SparseLinear), SparseLora))
    return config


class SparseLora(Linear):
    """y = (x W + b) + s x A B, with a frozen sparse W: what peft puts around a sparse layer."""

    @property
    def lora_variants(self):
        return {(): None}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused: A B is dense.

        Raises:
          ValueError: always, with the ways out.
        """
        base = self.get_base_layer()
        raise ValueError(
            f"an adapter can't be merged into a {type(base).__name__}: A B is a dense matrix, of which the pattern "
            "holds a part only. Keep the adapter beside the layer, or make the layers dense before they get adapters: "
            "torch_bridge.densify(model), or layer.to_linear() one by one."
        )
