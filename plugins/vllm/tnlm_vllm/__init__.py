"""Lets vLLM serve models that `tnlm export --to vllm` wrote; found as a vLLM plug-in."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Register the quantization ``"tnlm"``; vLLM calls this in each of its processes."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from tnlm_vllm.quantization import METHOD, TnlmVllmConfig

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(TnlmVllmConfig)
