from __future__ import annotations

import importlib.util
import json

import gguf
import pytest
import torch
import transformers
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import tnlm
from tnlm.checkpoint.dense_models import load_model, looks_like_path
from tnlm.errors import CheckpointError


@pytest.fixture
def llama_dir(tiny_llama, word_tokenizer, tmp_path):
    path = tmp_path / "llama"
    tiny_llama().save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def gguf_file(tiny_llama, tmp_path):
    """A GGUF file of the tiny Llama, with a small byte-pair vocabulary."""
    model = tiny_llama(tie_word_embeddings=True)
    config, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(ord("!") + i) for i in range(config.vocab_size - 1)]
    writer.add_token_list([*letters, "!#"])
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            target = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(target, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_directory(llama_dir, tiny_llama, word_tokenizer):
    model, tokenizer = load_model(llama_dir)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert tokenizer.get_vocab() == word_tokenizer.get_vocab()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_dtype(dtype, expected, tiny_gpt2, tmp_path):
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=dtype)
    assert model.dtype == getattr(torch, expected)


def test_a_directory_without_tokenizer_gives_none_rather_than_an_empty_one(tiny_gpt2, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    assert load_model(tmp_path)[1] is None


def test_gguf_becomes_an_ordinary_model(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file)
    assert model.dtype == torch.float32
    assert tokenizer("#$%")["input_ids"] == [2, 3, 4]
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again, _ = load_model(tmp_path / "out")
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("size", [3, 100, 2000, -64])
def test_truncated_gguf(gguf_file, size):
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cannot be loaded") as caught:
        load_model(gguf_file)
    assert caught.value.__cause__ is not None


def test_gguf_without_its_package(gguf_file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'tnlm\[gguf\]'"):
        load_model(gguf_file)


@pytest.mark.parametrize("size", [0, 4, 100, -4])
def test_truncated_safetensors(llama_dir, size):
    weights = llama_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="llama: cannot be loaded") as caught:
        load_model(llama_dir)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"hidden_size": 64}, "cannot be loaded"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"num_hidden_layers": 3}, "9 tensors of LlamaForCausalLM are not in the checkpoint"),
    ],
)
def test_a_config_that_does_not_fit(edit, message, llama_dir):
    config = llama_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | edit))
    with pytest.raises(CheckpointError, match=message):
        load_model(llama_dir)


def test_broken_config_and_missing_weights(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(llama_dir)
    (llama_dir / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        load_model(llama_dir)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_an_encoder_keeps_its_class(kind, tiny_bert, tmp_path):
    kind(tiny_bert().config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)[0]) is kind


@pytest.mark.parametrize("named", [[], None, ["Unheard"], ["GPT2LMHeadModel"], ["LlamaConfig"]])
def test_a_config_that_names_no_class_of_its_own_is_a_causal_model(named, llama_dir):
    config = llama_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": named}))
    assert type(load_model(llama_dir)[0]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "name",
    [
        "runs/model",
        "model/",
        "runs\\model",
        "~/model",
        "weights.safetensors",
        "a/b.bin",
        "my model",
        "Modell-Größe",
        "one--two",
        "x" * 97,
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_a_hub(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(name)
    with pytest.raises(CheckpointError, match="no such file"):
        tnlm.load(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Owner/Name-3.2-1B", "a_b/c.d-e"])
def test_a_hub_id_is_none(name):
    assert not looks_like_path(name)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for source, message in [
        (tmp_path / "none", "no such file or directory"),
        ("./none", "no such file or directory"),
        ("one/two/three", "no such file or directory"),
        ("none.gguf", "no such file"),
        (tmp_path, r"no config\.json"),
        (tmp_path / "weights.bin", r"not a \.gguf"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_model(source)
