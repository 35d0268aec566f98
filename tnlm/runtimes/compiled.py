"""Compiled decoding: `generate` runs every step after the prompt as one compiled graph."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from torch import nn
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from tnlm.errors import ModelError, OptionError

COMPILERS = {"darwin": "clang++", "win32": "cl"}
"""What compiles the C++ that torch's default backend writes for the CPU; elsewhere g++."""


class CompiledGeneration(GenerationConfig):
    """How a model generates by a compiled step; what is saved of it names no static cache."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save it as that of a model whose decoding is not compiled."""
        cache, self.cache_implementation = self.cache_implementation, None
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.cache_implementation = cache


def compile_decoding(model: PreTrainedModel, *, backend: str = "inductor") -> PreTrainedModel:
    """Let ``model.generate`` compile its decoding step, on any device.

    It sets the model's generation config: a static cache, whose shapes stay the same from step to
    step, and what transformers compiles the step with. The prompt is not compiled. The first step
    takes as long as compiling does, and so does the first of a longer cache than before, for which
    ``max_cache_len=`` of ``generate`` sets a size at once. A saved model has none of this.

    Args:
        model: a dense or compressed causal language model; changed in place.
        backend: of ``torch.compile``.

    Returns:
        The model.

    Raises:
        ModelError: if the model generates no text or cannot be compiled, or its device is the CPU
            and no C++ compiler is there.
        OptionError: if torch has no such backend.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> config = LlamaConfig(**size, num_hidden_layers=1, vocab_size=9)
        >>> model = compile_decoding(LlamaForCausalLM(config), backend="eager")
        >>> model.generation_config.cache_implementation
        'static'
    """
    _check(model, backend)
    chosen = CompileConfig(backend=backend)
    # Without it transformers compiles on GPUs only.
    chosen._compile_all_devices = True  # type: ignore[assignment]
    made = CompiledGeneration.from_dict(model.generation_config.to_dict())
    made.cache_implementation = "static"
    made.compile_config = chosen
    model.generation_config = made
    return model


def _check(model: nn.Module, backend: str) -> None:
    """Raise unless the step of a model can be compiled here."""
    import torch._dynamo

    named = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ModelError(f"{named} does not generate text, so it has no decoding to compile")
    if not model._can_compile_fullgraph:
        raise ModelError(f"transformers cannot compile {named}: it has no static cache")
    if backend not in torch._dynamo.list_backends(exclude_tags=None):
        allowed = ", ".join(torch._dynamo.list_backends())
        raise OptionError(f"backend={backend!r}; allowed: {allowed}", argument="backend")
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if backend == "inductor" and model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ModelError(
            f"compiling for the CPU needs a C++ compiler, and {compiler} is not on PATH; install "
            "it, name another one in the environment variable CXX, or use the model uncompiled"
        )
