"""Models that share one config object do not write into each other's."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tnlm
from tests.integrations import families
from tnlm.checkpoint import transformers_plugin as huggingface
from tnlm.checkpoint.configs import holders, own_config
from tnlm.errors import ModelError
from tnlm.recovery import merging

IDS = torch.arange(24).reshape(2, 12) % 61 + 3


def outputs(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def pair(tiny_llama):
    """Two models that share a config object."""
    first = tiny_llama()
    return first, LlamaForCausalLM(first.config).eval()


def check_dense(model, directory):
    model.save_pretrained(directory)
    text = (directory / "config.json").read_text().lower()
    assert "tnlm" not in text
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(directory)), outputs(model))


def test_a_teacher_stays_dense(pair, tmp_path):
    student, teacher = pair
    before = json.dumps(teacher.config.to_dict())
    tnlm.compress(student, "svd")
    assert json.dumps(teacher.config.to_dict()) == before
    check_dense(teacher, tmp_path / "teacher")
    assert torch.equal(
        outputs(tnlm.load(tnlm.save(student, tmp_path / "student"))), outputs(student)
    )


def test_a_dense_model_made_from_the_config_of_a_compressed_one(compressed, tmp_path):
    student = compressed("llama", "svd")
    teacher = type(student)(student.config).eval()
    check_dense(teacher, tmp_path / "teacher")
    for refuse in (lambda: tnlm.save(teacher, tmp_path / "no"), lambda: tnlm.to_dense(teacher)):
        with pytest.raises(ModelError, match="not compressed by tnlm"):
            refuse()
    tnlm.compress(teacher, "kron")
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        assert torch.equal(outputs(tnlm.load(tmp_path / name)), outputs(model))


@pytest.mark.parametrize("again", ["svd", "kron"])
def test_two_compressed_models_save_what_they_hold(again, pair, tmp_path):
    first, second = pair
    tnlm.compress(first, "svd", keep_targets=0.5)
    tnlm.compress(second, again, targets=["down_proj"])
    for number, model in enumerate(pair):
        loaded = tnlm.load(tnlm.save(model, tmp_path / str(number)))
        assert torch.equal(outputs(loaded), outputs(model))
    tnlm.to_dense(first)
    assert torch.equal(outputs(tnlm.load(tnlm.save(second, tmp_path / "again"))), outputs(second))


def test_pruning_leaves_the_sizes_of_others(pair, tmp_path):
    small, other = pair
    batches = [{"input_ids": IDS, "labels": IDS}] * 4
    tnlm.prune(small, batches, keep=0.5, steps=2, rank=2, every=1, progress=False)
    assert small.config.intermediate_size < other.config.intermediate_size
    check_dense(other, tmp_path / "other")


def test_merging_adapters_leaves_the_entries_of_others(compressed):
    first = compressed("llama", "svd")
    second = LlamaForCausalLM(first.config)
    entries = json.dumps(second.config.quantization_config.to_dict()["modules"])
    merging.attach(first, huggingface.TnlmConfig())
    assert json.dumps(second.config.quantization_config.to_dict()["modules"]) == entries


def test_every_module_gets_the_copy_and_inner_configs_stay():
    model = families.make("llava")
    before, inner = model.config, model.config.text_config
    count = len(list(holders(model)))
    made = own_config(model)
    assert made is not before
    assert model.config is model.model.config is made
    assert made.text_config is inner is model.model.language_model.config
    assert len(list(holders(model))) == count


def test_attention_obeys_the_config_of_the_compressed_model(pair):
    model, other = pair
    tnlm.compress(model, "svd")
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert other.model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_a_failure_puts_the_config_back(pair, monkeypatch):
    model, other = pair
    held = [vars(module)[name] for module, name in holders(model)]
    before, attributes = json.dumps(model.config.to_dict()), set(vars(model.model))
    real = huggingface.describe_parts

    def fail(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "describe_parts", fail)
    with pytest.raises(KeyboardInterrupt):
        tnlm.compress(model, "svd")
    assert model.config is other.config is model.model.config
    assert [vars(module)[name] for module, name in holders(model)] == held
    assert json.dumps(model.config.to_dict()) == before
    assert set(vars(model.model)) == attributes
