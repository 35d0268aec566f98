from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import tnlm
from tnlm.errors import ModelError
from tnlm.runtimes import get_runtime
from tnlm.runtimes.gguf_layout import _interleaved


def read(directory):
    (path,) = directory.iterdir()
    return gguf.GGUFReader(path)


def tensors(reader):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def field(reader, name):
    return reader.fields[name].contents()


def test_transformers_reads_back_what_was_written(tiny_llama, ids, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    tnlm.export(model, tmp_path, to="gguf", type="F32")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model-F32.gguf", quantization_config=GgufConfig(dequantize=True)
    ).eval()
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_every_block_has_its_own_width(narrowed, tmp_path):
    model = narrowed("llama.cpp", keep_targets=0.75)
    tnlm.export(model, tmp_path, to="gguf", type="F32")
    reader = read(tmp_path)
    widths = [block.mlp.up_proj.out_features for block in model.model.layers]
    assert field(reader, "general.architecture") == "deci"
    assert field(reader, "deci.feed_forward_length") == widths
    assert all(width % get_runtime("llama.cpp").multiple == 0 for width in widths)
    found = tensors(reader)
    for number, block in enumerate(model.model.layers):
        up = block.mlp.up_proj.weight.detach().numpy()
        assert np.array_equal(found[f"blk.{number}.ffn_up.weight"], up)


def test_every_block_has_its_own_heads(few_heads, tmp_path):
    model = few_heads
    tnlm.export(model, tmp_path, to="gguf", type="F32")
    reader = read(tmp_path)
    keys = [block.self_attn.k_proj.out_features // 8 for block in model.model.layers]
    assert field(reader, "general.architecture") == "deci"
    assert field(reader, "deci.attention.head_count_kv") == keys == [1, 2, 1]
    assert field(reader, "deci.attention.head_count") == [2 * number for number in keys]
    found = tensors(reader)
    for number, block in enumerate(model.model.layers):
        queries = block.self_attn.q_proj.weight.detach()
        wanted = _interleaved(queries, 2 * keys[number]).numpy()
        assert np.array_equal(found[f"blk.{number}.attn_q.weight"], wanted)


def test_one_width_is_an_ordinary_llama(narrowed, tmp_path):
    tnlm.export(narrowed("transformers"), tmp_path, to="gguf")
    reader = read(tmp_path)
    assert field(reader, "general.architecture") == "llama"
    assert isinstance(field(reader, "llama.feed_forward_length"), int)


def test_a_qwen2_keeps_its_layout_and_biases(tiny_qwen2, tmp_path):
    tnlm.export(tiny_qwen2, tmp_path, to="gguf", type="F32")
    found = tensors(read(tmp_path))
    attention = tiny_qwen2.model.layers[1].self_attn
    for part in ("weight", "bias"):
        own = getattr(attention.q_proj, part).detach().numpy()
        assert np.array_equal(found[f"blk.1.attn_q.{part}"], own)


def test_rotated_pairs_stand_side_by_side():
    halves = torch.arange(8).reshape(8, 1)  # two heads of four rows
    assert _interleaved(halves, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", get_runtime("llama.cpp").types)
def test_sizes_are_known_before_writing(tiny_llama, tmp_path, kind):
    model = tiny_llama()
    made = get_runtime("llama.cpp").prepare(model, None, kind)
    made.write(tmp_path)
    reader = read(tmp_path)
    assert sum(tensor.n_bytes for tensor in reader.tensors) == made.bytes
    stored = {t.name: t.tensor_type.name for t in reader.tensors}
    # The width of 48 is no multiple of 32, so this matrix alone stays F16 in a quantized file.
    expected = kind if kind in ("F32", "F16", "BF16") else "F16"
    assert stored["blk.0.ffn_down.weight"] == expected
    assert stored["blk.0.ffn_up.weight"] == kind
    assert stored["blk.0.attn_norm.weight"] == "F32"


def test_llama3_frequencies_are_those_of_transformers(tiny_llama):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from tnlm.runtimes.gguf_layout import _llama3

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = tiny_llama(rope_parameters=rope, head_dim=32).config
    plain = 1.0 / 500.0 ** (torch.arange(0, 32, 2).double() / 32)
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.allclose((plain / _llama3(config)).float(), expected, rtol=1e-5)


def test_other_families_are_named(tiny_gpt2, tmp_path):
    with pytest.raises(ModelError, match="a gpt2 cannot be written to GGUF; allowed: llama"):
        tnlm.export(tiny_gpt2(), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_f16_leave_the_old_files(tiny_llama, tmp_path):
    model = tiny_llama()
    tnlm.export(model, tmp_path, to="gguf")
    before = next(tmp_path.iterdir()).read_bytes()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight is too large for F16"):
        tnlm.export(model, tmp_path, to="gguf", overwrite=True)
    assert next(tmp_path.iterdir()).read_bytes() == before
