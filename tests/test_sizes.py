"""The sizes in the guide are those of real models, and of what compression makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))
    import sizes

    yield sizes
    sys.modules.pop("sizes")


@pytest.mark.parametrize(
    ("name", "published"), [("1B", 1_235_814_400), ("8B", 8_030_261_248), ("70B", 70_553_706_496)]
)
def test_dense_models_have_the_published_number_of_parameters(sizes, name, published):
    assert sizes.size(sizes.SHAPES[name]).params == published


@pytest.mark.parametrize(
    ("keep", "precision"), [(1.0, None), (0.6, None), (1.0, "int8"), (1.0, "int4"), (0.6, "int8")]
)
def test_a_size_is_what_compression_makes(sizes, keep, precision):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, **SMALL)).to(torch.bfloat16)
    found = sizes.size(SMALL, keep, precision)
    if keep == 1.0 and precision is None:
        assert found.params == sum(p.numel() for p in model.parameters())
        return
    chosen = ("svd", {"keep_targets": keep}) if keep < 1.0 else ("rtn", {})
    tnlm.compress(model, chosen[0], precision=precision, progress=False, **chosen[1])
    made = tnlm.report(model).plan.model_after
    assert (found.params, found.bytes, found.macs) == (made.params, made.bytes, made.macs)
