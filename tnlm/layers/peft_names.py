"""LoRA on factorized layers by their ordinary names, as `peft.LoraConfig` gives them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from tnlm.errors import ModelError, OptionError
from tnlm.layers.embedding import FactorizedEmbedding
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear

if TYPE_CHECKING:
    import peft


def adaptable(config: peft.LoraConfig) -> peft.LoraConfig:
    """Let a LoRA stand beside factorized layers and tables, and return the same config.

    PEFT knows `nn.Linear` and `nn.Embedding` only, and learns of other layers from the config. What
    it saves is an ordinary adapter. ``PeftModel.from_pretrained`` reads it again, on the dense
    model as it is, and on a compressed one with its config made adaptable (``config=``). Merging
    it needs the dense model: factors have no place for a LoRA beside their product.

    Args:
        config: with ``target_modules`` by the names that the dense model has.

    Raises:
        OptionError: if it is no `peft.LoraConfig`, or PEFT is not installed.

    Example:
        >>> import peft, tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = tnlm.compress(LlamaForCausalLM(tiny), "svd", keep_targets=0.5)
        >>> config = adaptable(peft.LoraConfig(target_modules=["q_proj"], r=2))
        >>> with warnings.catch_warnings(action="ignore"):
        ...     adapted = peft.get_peft_model(model, config)
        >>> adapted.get_nb_trainable_parameters()[0]  # 2 * (16 + 16)
        64
    """
    try:
        from peft import LoraConfig, PeftType
        from peft.tuners import lora
    except ImportError as error:
        raise OptionError(
            "LoRA needs the package peft, which is not installed: pip install 'tnlm[train]'"
        ) from error
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise OptionError(
            f"a peft.LoraConfig is wanted, not {type(config).__name__}; other adapters go on "
            "factors, each of which is an nn.Linear: target_modules=['q_proj.left', ...]"
        )

    class FactoredLinear(_Unmerged, lora.Linear):
        """A LoRA beside a factorized layer."""

    class FactoredTable(_Unmerged, lora.Embedding):
        """A LoRA beside a factorized table."""

    config._register_custom_module(
        {
            FactorizedLinear: FactoredLinear,
            FusedLinear: FactoredLinear,
            FactorizedEmbedding: FactoredTable,
        }
    )
    return config


def is_adapter(module: nn.Module) -> bool:
    """Tell whether a module is PEFT's, or one of those above.

    Example:
        >>> is_adapter(nn.Linear(2, 2))
        False
    """
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


class _Unmerged:
    """Refuses to merge: PEFT would change a weight that is rebuilt and then forgotten."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # it is registered
            super().__init__(base_layer, *args, **kwargs)  # type: ignore[call-arg]

    def merge(self, *_: Any, **__: Any) -> None:
        """Raise `ModelError`."""
        raise ModelError(
            "a LoRA beside a product of factors does not merge into them. Make the base dense with "
            "tnlm.to_dense, read the adapter on it and merge there; or train the LoRA with "
            "tnlm.heal, which merges it; or put it on factors, target_modules=['q_proj.left', ...]"
        )
