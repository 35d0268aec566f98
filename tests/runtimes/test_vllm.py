"""What is written for vLLM, run by the plug-in's own products without vLLM."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tnlm_vllm.chains import Merged
from tnlm_vllm.layout import dense, read_layers
from tnlm_vllm.loading import Slots
from torch import nn
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.errors import ModelError


def compress(model, scheme, **options):
    return tnlm.compress(model, scheme, keep_targets=0.6, progress=False, **options)


def product(matrix):
    made = nn.Linear(*matrix.shape[::-1], bias=False)
    made.weight = nn.Parameter(matrix)
    return made


def run(directory, names, x):
    """Apply exported layers of one input side by side, as the plug-in does in vLLM."""
    config = json.loads((directory / "config.json").read_text())
    layers = read_layers(config["quantization_config"])
    held = load_file(directory / "model.safetensors")
    parts = [
        layers[name] if name in layers else dense(tuple(held[f"{name}.weight"].shape))
        for name in names
    ]
    slots = Slots("merged", parts, x.dtype)
    for part, name in enumerate(names):
        for tensor in parts[part].tensors():
            parameter = slots.parameters[tensor]
            parameter.weight_loader(parameter, held[f"{name}.{tensor}"], part)
    slots.check()
    return Merged(parts, [slots.tensors(part) for part in range(len(parts))], product)(x)


def expected(model, names, x):
    return torch.cat([model.get_submodule(name)(x) for name in names], -1)


def attention(block=0):
    return [f"model.layers.{block}.self_attn.{part}_proj" for part in "qkv"]


def feed_forward(*parts, block=0):
    return [f"model.layers.{block}.mlp.{part}_proj" for part in parts]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("svd", {}),
        ("svd", {"gauge": False}),
        ("kron", {}),
        ("tucker", {}),
        ("tt", {}),
        ("tr", {}),
        ("btt", {}),
    ],
)
@torch.no_grad()
def test_every_format_gives_what_the_layers_give(tiny_llama, tmp_path, scheme, options):
    model = compress(tiny_llama(), scheme, **options)
    tnlm.export(model, tmp_path, to="vllm")
    for names in (attention(), feed_forward("gate", "up"), feed_forward("down", block=1)):
        x = torch.randn(2, 3, model.get_submodule(names[0]).in_features)
        torch.testing.assert_close(
            run(tmp_path, names, x), expected(model, names, x), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_dense_and_factored_parts_of_a_merged_layer(tiny_llama, tmp_path):
    model = compress(tiny_llama(), "svd", targets=["q_proj", "v_proj"])
    tnlm.export(model, tmp_path, to="vllm")
    x = torch.randn(4, 32)
    made = run(tmp_path, attention(), x)
    torch.testing.assert_close(made, expected(model, attention(), x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_int8_factors_and_matrices(tiny_llama, tmp_path, dtype):
    model = compress(tiny_llama().to(dtype), "svd", precision="int8", group=None)
    tnlm.export(model, tmp_path / "svd", to="vllm")
    model_of_bits = tnlm.compress(tiny_llama().to(dtype), "rtn", precision="int8", progress=False)
    tnlm.export(model_of_bits, tmp_path / "rtn", to="vllm")
    for name, made in (("svd", model), ("rtn", model_of_bits)):
        x = torch.randn(4, 32, dtype=dtype)
        found, wanted = run(tmp_path / name, attention(), x), expected(made, attention(), x)
        close = 1e-5 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(found, wanted, atol=close, rtol=close)


def test_tensors_are_no_larger_than_those_of_the_compressed_model(tiny_llama, tmp_path):
    model = compress(tiny_llama(), "svd")
    tnlm.export(model, tmp_path, to="vllm")
    held = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in held.values() if t.is_floating_point()) == model.num_parameters()


def test_one_narrower_width_is_that_of_the_config(narrowed, tmp_path):
    model = narrowed("transformers", keep_targets=0.6)
    tnlm.export(model, tmp_path, to="vllm")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.intermediate_size < model.config.intermediate_size
    assert not hasattr(loaded.config, "quantization_config")  # needs no plug-in


def test_widths_that_differ_are_refused_with_the_way_out(narrowed, tmp_path):
    model = narrowed("llama.cpp", keep_targets=0.75)
    with pytest.raises(ModelError, match=r"one width for all blocks\. Export it with to='decilm'"):
        tnlm.export(model, tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()


def test_fewer_heads_are_refused_with_the_way_out(few_heads, tmp_path):
    with pytest.raises(ModelError, match=r"q_proj.weight has 2 heads of 4.*to='gguf'"):
        tnlm.export(few_heads, tmp_path / "out", to="vllm")


def test_a_tied_head_is_written_once(tiny_llama, tmp_path):
    model = compress(tiny_llama(tie_word_embeddings=True), "svd")
    tnlm.export(model, tmp_path, to="vllm")
    held = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in held
    assert "lm_head.weight" not in held


@torch.no_grad()
def test_the_biases_of_a_qwen2_stay(tiny_qwen2, tmp_path):
    model = compress(tiny_qwen2, "svd")
    tnlm.export(model, tmp_path, to="vllm")
    held, x = load_file(tmp_path / "model.safetensors"), torch.randn(4, 32)
    bias = torch.cat([held[f"{name}.bias"] for name in attention()])
    made = run(tmp_path, attention(), x) + bias
    torch.testing.assert_close(made, expected(model, attention(), x), atol=1e-5, rtol=1e-4)


def test_transformers_refuses_what_only_vllm_runs(tiny_llama, tmp_path):
    tnlm.export(compress(tiny_llama(), "svd"), tmp_path, to="vllm")
    with pytest.raises(OSError, match=r"SERVE_WITH_VLLM.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(tnlm.TnlmError, match="SERVE_WITH_VLLM"):
        tnlm.load(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        (
            "svd",
            {"targets": ["linear", "embeddings"]},
            r"embed_tokens is compressed \(low-rank\).*ignore=",
        ),
        ("btt", {"precision": "int8"}, r"q_proj is a block train in int8.*without precision="),
        (
            tnlm.scheme("llm-surgeon", metric="identity", allocation="uniform"),
            {},
            r"_proj is compressed \(submatrix\), which tnlm-vllm does not run",
        ),
        ("svd", {"precision": "int4"}, "runs int8 with one scale a row: compress with precision="),
    ],
)
def test_what_is_not_run_is_refused(tiny_llama, tmp_path, scheme, options, message):
    with pytest.raises(ModelError, match=message):
        tnlm.export(compress(tiny_llama(), scheme, **options), tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()


def test_biases_that_were_added_are_refused(tiny_llama, ids, tmp_path):
    model = compress(tiny_llama(), "afm", calibration=ids, max_length=16)
    with pytest.raises(ModelError, match=r"q_proj and \d+ others were given a bias"):
        tnlm.export(model, tmp_path / "out", to="vllm")


def test_another_family_is_refused(tiny_gpt2, tmp_path):
    with pytest.raises(ModelError, match=r"a gpt2 .* allowed: causal models of llama, mistral"):
        tnlm.export(tiny_gpt2(), tmp_path / "out", to="vllm")


def test_a_second_quantizer_is_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match="quantized by another library as well"):
        tnlm.export(model, tmp_path / "out", to="vllm")


def test_portable_keeps_auto_to_what_is_run(tiny_llama, ids):
    decided = tnlm.plan(
        tiny_llama(),
        "auto",
        keep_targets=0.7,
        calibration=ids,
        max_length=16,
        portable="vllm",
        progress=False,
    )
    assert {layer.format for layer in decided.layers} <= {"low-rank", None}


@torch.no_grad()
def test_factors_that_blocks_share_are_written_for_each(tiny_llama, ids, tmp_path):
    model = compress(tiny_llama(), "basis-sharing", calibration=ids, max_length=16)
    tnlm.export(model, tmp_path, to="vllm")
    for block in range(2):
        x, names = torch.randn(4, 32), feed_forward("gate", "up", block=block)
        torch.testing.assert_close(
            run(tmp_path, names, x), expected(model, names, x), atol=1e-5, rtol=1e-4
        )
