"""Real vLLM serves what is exported; `make test-serving` installs it in a place of its own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tnlm
from tnlm.schemes import get_scheme

PYTHON = os.environ.get("TNLM_VLLM_PYTHON")
"""A Python with vLLM and tnlm-vllm."""
COUNT = 8

pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-serving names a Python with vLLM")


def make(kind=(LlamaConfig, LlamaForCausalLM), dtype=torch.float32, **config):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model = kind[1](kind[0](**(sizes | config))).to(dtype).eval()
    with torch.no_grad():  # random logits are nearly flat, and rounding would choose
        model.get_output_embeddings().weight.mul_(50)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as made
                torch.nn.init.normal_(parameter)
    return model


def mixed(model, prompts):
    formats = ("low-rank", "kronecker", "tensor-train")
    scheme = replace(get_scheme("auto"), formats=formats)
    return tnlm.compress(
        model, scheme, keep_targets=0.6, calibration=prompts, max_length=6, progress=False
    )


def compress(model, scheme, **options):
    return tnlm.compress(model, scheme, keep_targets=0.6, progress=False, **options)


def narrowed(model, prompts):
    return compress(
        model, "auto", calibration=prompts, max_length=6, portable="transformers", multiple=16
    )


MODELS = {
    "dense": lambda prompts: make(),
    "svd": lambda prompts: compress(make(), "svd"),
    "kron": lambda prompts: compress(make(), "kron"),
    "tt": lambda prompts: compress(make(), "tt"),
    "btt": lambda prompts: compress(make(), "btt"),
    "mixed": lambda prompts: mixed(make(), prompts),
    "some": lambda prompts: compress(make(), "svd", targets=["q_proj", "v_proj", "gate_proj"]),
    "tied": lambda prompts: compress(make(tie_word_embeddings=True), "svd"),
    "narrowed": lambda prompts: narrowed(make(), prompts),
    "int8": lambda prompts: compress(make(), "svd", precision="int8"),
    "mistral": lambda prompts: compress(make((MistralConfig, MistralForCausalLM)), "svd"),
    "qwen2": lambda prompts: compress(make((Qwen2Config, Qwen2ForCausalLM)), "svd"),
    "qwen3": lambda prompts: compress(make((Qwen3Config, Qwen3ForCausalLM)), "svd"),
}
BROKEN = {
    "saved": lambda folder: tnlm.save(compress(make(), "svd"), folder),
    "lacking": lambda folder: _lacking(folder),
}


def _lacking(folder):
    from safetensors.torch import load_file, save_file

    tnlm.export(compress(make(), "svd"), folder, to="vllm")
    file = folder / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.mlp.up_proj.factor1"]
    save_file(held, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, 64, (20, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(prompts):
    return {name: made(prompts) for name, made in MODELS.items()}


@pytest.fixture(scope="module")
def served(models, prompts, tmp_path_factory):
    """Return what vLLM says, by model: one process serves all, since it takes long to start."""
    folder = tmp_path_factory.mktemp("served")
    for name, model in models.items():
        tnlm.export(model, folder / name, to="vllm")
    for name, write in BROKEN.items():
        write(folder / name)
    (folder / "prompts.json").write_text(json.dumps(prompts.tolist()))
    names = [*MODELS, *BROKEN]
    script = Path(__file__).with_name("greedy_in_vllm.py")
    words = [PYTHON, script, *names, "--prompts", "prompts.json", "--count", str(COUNT)]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(words, cwd=folder, check=True, env=alone)
    return {name: json.loads((folder / name / "vllm.json").read_text()) for name in names}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(models, prompts, served, name):
    model = models[name]
    mask = torch.ones_like(prompts)
    made = model.generate(prompts, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
    assert served[name].get("tokens") == made[:, prompts.shape[1] :].tolist(), served[name]
    logs = model(made).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    taken = logs.gather(-1, made[:, prompts.shape[1] :, None])[..., 0]
    torch.testing.assert_close(torch.tensor(served[name]["logprobs"]), taken, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("saved", "saved by tnlm, not exported for vLLM: run `tnlm export"),
        ("lacking", "layers.1.mlp.gate_up_proj: the files lack factor1 of part 1"),
    ],
)
def test_what_cannot_be_served_is_refused_in_plain_words(served, name, message):
    assert message in served[name]["error"]
