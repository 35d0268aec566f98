from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

import tnlm
from tnlm.errors import ModelError, OptionError


def test_loads_in_a_process_without_tnlm_with_the_same_logits(narrowed, ids, tmp_path):
    model = narrowed("transformers")
    tnlm.export(model, tmp_path / "plain", to="transformers")
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('plain').eval()\n"
        "torch.save(model(torch.load('ids.pt')).logits.detach(), 'logits.pt')\n"
        "assert 'tnlm' not in sys.modules\n"
    )
    # -P leaves the current directory out, and the environment has no PYTHONPATH.
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "logits.pt"), model(ids).logits, atol=1e-5)


def test_is_as_small_as_the_compressed_model(narrowed, tmp_path):
    model = narrowed("transformers", keep_targets=0.6)
    tnlm.export(model, tmp_path, to="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.config.intermediate_size < model.config.intermediate_size
    assert not hasattr(loaded.config, "quantization_config")


def test_a_gpt2_keeps_its_own_layout(tiny_gpt2, ids, tmp_path):
    model = tnlm.compress(
        tiny_gpt2(),
        "auto",
        keep_targets=0.7,
        calibration=ids,
        max_length=16,
        portable="transformers",
        multiple=8,
        progress=False,
    )
    tnlm.export(model, tmp_path, to="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.n_inner < 4 * loaded.config.n_embd
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_factors_are_multiplied_out(tiny_llama, ids, tmp_path):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.5, progress=False)
    tnlm.export(model, tmp_path, to="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_a_dense_model_is_written_as_it_is(tiny_llama, ids, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    tnlm.export(model, tmp_path, to="transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_widths_that_differ_are_refused_before_anything_is_written(narrowed, tmp_path):
    model = narrowed("llama.cpp", keep_targets=0.75)
    widths = {block.mlp.up_proj.out_features for block in model.model.layers}
    assert len(widths) > 1
    with pytest.raises(ModelError, match=r"one width for all blocks.*portable='transformers'"):
        tnlm.export(model, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def test_biases_that_were_added_are_refused(tiny_llama, ids, tmp_path):
    model = tnlm.compress(
        tiny_llama(), "afm", keep_targets=0.5, calibration=ids, max_length=16, progress=False
    )
    with pytest.raises(ModelError, match=r"q_proj and \d+ others were given a bias"):
        tnlm.export(model, tmp_path / "out", to="transformers")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "guf"}, "unknown to='guf'; did you mean 'gguf'"),
        ({"to": "gguf", "type": "F61"}, "type='F61' with to='gguf'; did you mean 'F16'"),
    ],
)
def test_unknown_kinds_of_files(tiny_llama, tmp_path, given, message):
    with pytest.raises(OptionError, match=message):
        tnlm.export(tiny_llama(), tmp_path / "out", **given)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_that_does_not_generate(tiny_llama, ids, tmp_path, kind):
    model = kind(tiny_llama(pad_token_id=0).config).eval()
    tnlm.export(model, tmp_path, to="transformers")
    loaded = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    for to in ("decilm", "vllm"):
        with pytest.raises(ModelError, match=rf"\({kind.__name__}\).* causal models of llama"):
            tnlm.export(model, tmp_path / to, to=to)


@pytest.mark.parametrize("to", ["decilm", "vllm"])
def test_another_activation_is_refused(tiny_llama, tmp_path, to):
    with pytest.raises(ModelError, match="hidden_act='gelu'"):
        tnlm.export(tiny_llama(hidden_act="gelu"), tmp_path / "out", to=to)


@pytest.mark.parametrize("to", ["transformers", "decilm", "vllm"])
def test_an_invalid_generation_config_is_refused(tiny_llama, tmp_path, to):
    model = tiny_llama()
    model.generation_config.update(do_sample=False, temperature=0.5)
    with pytest.raises(ModelError, match=r"(?s)generation_config cannot be written: .*temperature"):
        tnlm.export(model, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_the_shell_names_both_options_of_a_wrong_type(tiny_llama, tmp_path):
    with pytest.raises(OptionError) as caught:
        tnlm.export(tiny_llama(), tmp_path / "out", to="gguf", type="F61")
    assert caught.value.arguments == ("type", "to")


def test_an_export_over_files_is_refused(tiny_llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(tnlm.TnlmError, match="not empty"):
        tnlm.export(tiny_llama(), tmp_path, to="transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
