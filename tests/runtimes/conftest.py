from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tnlm

WIDTH = 128


@pytest.fixture(scope="session")
def ids():
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def narrowed(tiny_llama, ids):
    """Make a Llama whose feed-forward layers a runtime executes as they are."""

    def make(portable, keep_targets=0.8, **config):
        model = tiny_llama(intermediate_size=WIDTH, num_hidden_layers=3, **config)
        return tnlm.compress(
            model,
            "auto",
            keep_targets=keep_targets,
            calibration=ids,
            max_length=16,
            portable=portable,
            progress=False,
        )

    return make


@pytest.fixture
def few_heads(tiny_llama, ids):
    """A Llama whose blocks keep one, two and one of two key/value heads."""
    model = tiny_llama(num_hidden_layers=3, num_key_value_heads=2)
    scheme = tnlm.scheme("modegpt", formats=("heads",))
    chosen = {"targets": r".*\.[02]\.self_attn.*", "keep_targets": 0.5, "progress": False}
    return tnlm.compress(model, scheme, calibration=ids, max_length=16, **chosen)


@pytest.fixture
def tiny_qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero as made
            torch.nn.init.normal_(parameter)
    return model
