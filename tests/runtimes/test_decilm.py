from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    dynamic_module_utils,
)

import tnlm
from tnlm.errors import ModelError
from tnlm.runtimes.decilm import MULTIPLE, _feed_forward


@pytest.fixture(autouse=True)
def own_modules(monkeypatch, tmp_path_factory):
    """Keep the copies that transformers makes of a config's file out of the home directory."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)


def read(directory):
    """Return the model that a program builds from a DeciLM directory."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    fields = {k: v for k, v in config.to_dict().items() if k in LlamaConfig().to_dict()}
    model = LlamaForCausalLM(LlamaConfig(**{**fields, "model_type": "llama"})).eval()
    for block, said in zip(model.model.layers, config.block_configs, strict=True):
        mult = getattr(said.ffn, "ffn_mult", None)
        width = said.ffn.intermediate_size if mult is None else width_of(mult, config.hidden_size)
        for name in ("gate_proj", "up_proj"):
            block.mlp.set_submodule(name, nn.Linear(config.hidden_size, width, bias=False))
        block.mlp.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        assert said.attention.no_op is said.ffn.no_op is False
        assert config.num_key_value_heads * said.attention.n_heads_in_group == (
            config.num_attention_heads
        )
    held = load_file(directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(held, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model


def width_of(mult, hidden):
    """Return the width that programs derive from a multiple of the hidden size."""
    return -(-int(2 * mult * hidden / 3) // MULTIPLE) * MULTIPLE


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_compressed_model(narrowed, ids, tmp_path, tied):
    model = narrowed("llama.cpp", keep_targets=0.75, tie_word_embeddings=tied)
    assert len({block.mlp.up_proj.out_features for block in model.model.layers}) > 1
    tnlm.export(model, tmp_path, to="decilm")
    with torch.no_grad():
        assert torch.allclose(read(tmp_path)(ids).logits, model(ids).logits, atol=1e-5)


def test_widths_in_multiples_of_256_are_read_by_all_programs(tiny_llama, ids, tmp_path):
    model = tnlm.compress(
        tiny_llama(intermediate_size=1024),
        "auto",
        keep_targets=0.6,
        calibration=ids,
        max_length=16,
        portable="decilm",
        progress=False,
    )
    tnlm.export(model, tmp_path, to="decilm")
    blocks = json.loads((tmp_path / "config.json").read_text())["block_configs"]
    found = [width_of(block["ffn"]["ffn_mult"], 32) for block in blocks]
    assert found == [block.mlp.up_proj.out_features for block in model.model.layers]
    assert min(found) < 1024
    with torch.no_grad():
        assert torch.allclose(read(tmp_path)(ids).logits, model(ids).logits, atol=1e-5)


@given(st.integers(1, 300), st.integers(8, 20000))
def test_multiples_give_their_width_also_when_rounded(count, hidden):
    [said] = _feed_forward([count * MULTIPLE], hidden)
    for mult in (said["ffn_mult"], round(said["ffn_mult"], 6)):
        assert width_of(mult, hidden) == count * MULTIPLE


def test_other_widths_are_warned_of(tiny_llama, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "tnlm"):
        tnlm.export(tiny_llama(), tmp_path, to="decilm")
    assert "vLLM reads this model, but SGLang and MLX do not" in caplog.text


def test_a_process_without_tnlm_reads_the_config(tiny_llama, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    tnlm.export(tiny_llama(rope_parameters=rope), tmp_path / "model", to="decilm")
    script = (
        "import sys; from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained('model', trust_remote_code=True)\n"
        "print(config.block_configs[1].ffn.intermediate_size)\n"
        "print(config.rope_parameters['rope_theta'])\n"
        "assert 'tnlm' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["48", "5000.0"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 5000.0


def test_other_models_are_refused_before_anything_is_written(tiny_gpt2, tiny_qwen2, tmp_path):
    for model in (tiny_gpt2(), tiny_qwen2):
        with pytest.raises(
            ModelError, match="cannot be written as DeciLM; allowed: causal models of llama"
        ):
            tnlm.export(model, tmp_path / "out", to="decilm")
    assert not (tmp_path / "out").exists()


def test_a_sliding_window_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    model = MistralForCausalLM(config)
    with pytest.raises(ModelError, match="sliding_window=8, which DeciLM does not have"):
        tnlm.export(model, tmp_path / "out", to="decilm")
    model.config.sliding_window = None
    tnlm.export(model, tmp_path / "out", to="decilm")


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    prompts = json.loads(sys.argv[2])
    model = LLM(
        sys.argv[1],
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
    )
    asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    made = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    print(json.dumps([list(each.outputs[0].token_ids) for each in made]))
"""


@pytest.mark.skipif("TNLM_VLLM_PYTHON" not in os.environ, reason="needs a Python that has vLLM")
def test_vllm_generates_the_same_tokens(ids, tiny_llama, tmp_path):
    model = tiny_llama(hidden_size=128, intermediate_size=1024, num_hidden_layers=3)
    model = tnlm.compress(
        model,
        "auto",
        keep_targets=0.7,
        calibration=ids,
        max_length=16,
        portable="llama.cpp",
        progress=False,
    )
    assert len({block.mlp.up_proj.out_features for block in model.model.layers}) > 1
    with torch.no_grad():  # random logits are nearly flat, and rounding would choose
        model.get_output_embeddings().weight.mul_(50)
    tnlm.export(model, tmp_path / "model", to="decilm")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    prompts = ids[:, :6].tolist()
    found = subprocess.run(
        [os.environ["TNLM_VLLM_PYTHON"], "-c", VLLM, str(tmp_path / "model"), json.dumps(prompts)],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    prompt = ids[:, :6]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == made[:, 6:].tolist()
