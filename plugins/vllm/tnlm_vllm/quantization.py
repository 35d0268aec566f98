"""The quantization ``"tnlm"`` of vLLM: linear layers are run through their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from tnlm_vllm.chains import Merged
from tnlm_vllm.layout import Layer, dense, read_layers
from tnlm_vllm.loading import Slots
from tnlm_vllm.versions import check_version

METHOD = "tnlm"
"""The ``quant_method`` of config.json."""


class TnlmVllmConfig(QuantizationConfig):
    """Which layers of a model are chains of products.

    Args:
        layers: their descriptions, by name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        """Keep the layers."""
        super().__init__()
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TnlmVllmConfig:
        """Read the ``quantization_config`` of a config.json.

        Raises:
            LayoutError: if it cannot be run.
            VersionError: if this vLLM was not tested.
        """
        check_version(vllm.__version__)
        return cls(read_layers(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Refuse a model that cannot be run before anything is loaded."""
        if hf_quant_cfg.get("quant_method") == METHOD:
            cls.from_config(hf_quant_cfg)

    def get_name(self) -> str:
        """Return ``"tnlm"``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return all dtypes that vLLM has for activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: there are no kernels of its own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: all is in config.json."""
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> LinearMethodBase | None:
        """Return what runs a linear layer; None for anything else.

        Raises:
            ValueError: if the model is split over devices, or quantized once more.
        """
        if not isinstance(layer, LinearBase):
            return None
        owner, _, name = prefix.rpartition(".")
        names = [f"{owner}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        if not any(part in self.layers for part in names):
            return UnquantizedLinearMethod()
        if get_tensor_model_parallel_world_size() > 1:
            raise ValueError(
                f"{prefix} is factored, and factors are not split over devices: set "
                "tensor_parallel_size=1"
            )
        if self.online_quantization_config is not None:
            raise ValueError(
                f"{prefix} is factored, and cannot be quantized once more: leave "
                "quantization_config out"
            )
        return TnlmLinearMethod(prefix, [self.layers.get(part) for part in names])


class TnlmLinearMethod(LinearMethodBase):
    """Runs one linear layer of vLLM, which may be several of the checkpoint side by side.

    Args:
        prefix: the layer's name.
        layers: the description of each part; None for a dense one.
    """

    def __init__(self, prefix: str, layers: Sequence[Layer | None]) -> None:
        """Keep the descriptions."""
        self.prefix, self.layers = prefix, layers
        self.plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the tensors of every part.

        Raises:
            ValueError: if the parts have not the sizes of the model.
        """
        shapes = [(rows, input_size_per_partition) for rows in output_partition_sizes]
        parts = [
            dense(shape) if part is None else part
            for part, shape in zip(self.layers, shapes, strict=True)
        ]
        if [part.shape for part in parts] != shapes:
            found = [part.shape for part in parts]
            raise ValueError(f"{self.prefix} is {found} in config.json, and {shapes} in the model")
        layer.tnlm_slots = Slots(self.prefix, parts, params_dtype)
        for name, parameter in layer.tnlm_slots.parameters.items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the products, and drop the tensors as they were loaded.

        Raises:
            ValueError: if the files lack a tensor.
        """
        slots = layer.tnlm_slots
        slots.check()
        parts = [slots.tensors(part) for part in range(len(slots.layers))]
        layer.tnlm_merged = Merged(slots.layers, parts, self._product)
        for name in slots.parameters:
            delattr(layer, name)
        del layer.tnlm_slots

    def _product(self, matrix: Tensor) -> nn.Module:
        return Product(matrix, self.plain)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer to ``(..., in)``."""
        made: Tensor = layer.tnlm_merged(x, bias)
        return made


class Product(nn.Module):
    """A product by vLLM's own kernels.

    Args:
        matrix: ``(out, in)``.
        method: vLLM's for ordinary layers.
    """

    def __init__(self, matrix: Tensor, method: UnquantizedLinearMethod) -> None:
        """Arrange the matrix as the kernel wants it."""
        super().__init__()
        self.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        self.method = method
        method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``(rows, in)``."""
        x = x if x.stride(-1) == 1 else x.contiguous()  # as oneDNN wants it
        made: Tensor = self.method.apply(self, x, None)
        return made
