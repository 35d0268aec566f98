"""LoRA on factorized layers by their original names, as in `peft.LoraConfig`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from tnlm.errors import ModelError, OptionError
from tnlm.layers.embedding import FactorizedEmbedding
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.packed import PackedLinear
from tnlm.layers.submatrix import SubmatrixLinear

if TYPE_CHECKING:
    import peft


def adaptable(config: peft.LoraConfig) -> peft.LoraConfig:
    """Make a LoRA config work on factorized layers and tables, and return the same config.

    PEFT knows only `nn.Linear` and `nn.Embedding`, and learns about other layers from the config.
    It saves an ordinary adapter. ``PeftModel.from_pretrained`` loads it on the dense model as
    usual, and on a compressed one with its config made adaptable (``config=``). Merging it needs
    the dense model, since factors cannot absorb a LoRA beside their product.

    Args:
        config: a config with ``target_modules`` named as in the dense model.

    Raises:
        OptionError: if it is not a `peft.LoraConfig`, or PEFT is not installed.

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
            f"expected a peft.LoraConfig, got {type(config).__name__}; put other adapters on "
            "factors, each of which is an nn.Linear: target_modules=['q_proj.left', ...]"
        )

    class FactoredLinear(_Unmerged, lora.Linear):
        """A LoRA beside a factorized layer."""

    class FactoredTable(_Unmerged, lora.Embedding):
        """A LoRA beside a factorized table."""

    config._register_custom_module(
        {
            FactorizedLinear: FactoredLinear,
            SubmatrixLinear: FactoredLinear,
            FusedLinear: FactoredLinear,
            PackedLinear: FactoredLinear,
            FactorizedEmbedding: FactoredTable,
        }
    )
    return config


def is_adapter(module: nn.Module) -> bool:
    """Return whether a module is PEFT's, or one of the classes above.

    Example:
        >>> is_adapter(nn.Linear(2, 2))
        False
    """
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


class _Unmerged:
    """Prevents merging: PEFT would change a rebuilt weight, which is then discarded."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # it is registered
            super().__init__(base_layer, *args, **kwargs)  # type: ignore[call-arg]

    def merge(self, *_: Any, **__: Any) -> None:
        """Raise `ModelError`."""
        raise ModelError(
            "a LoRA beside a product of factors cannot be merged into them. Make the base dense "
            "with tnlm.to_dense, load the adapter on it and merge there; or train the LoRA with "
            "tnlm.heal, which merges it; or put it on factors, target_modules=['q_proj.left', ...]"
        )
