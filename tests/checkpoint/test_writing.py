"""Whatever writes a compressed model writes the guard, and nothing else does."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

import tnlm
from tests.integrations import families
from tnlm.checkpoint.configs import GUARD

IDS = torch.arange(24).reshape(2, 12) % 61 + 3


def outputs(model):
    with torch.no_grad():
        return model(IDS)[0]


def text_of(directory):
    return (directory / "config.json").read_text()


def is_guarded(directory):
    return json.loads(text_of(directory)).get("transformers_weights") == GUARD


def check(directory, expected, cls=AutoModelForCausalLM):
    """Check that a directory stops plain transformers, and that tnlm reads it."""
    assert is_guarded(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(AUTO_QUANTIZER_MAPPING, "tnlm")
        patch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "tnlm")
        with pytest.raises(OSError, match=GUARD):
            cls.from_pretrained(directory)
    model = cls.from_pretrained(directory)
    assert torch.equal(outputs(model), expected)
    assert GUARD not in str(vars(model.config))
    return model


@pytest.fixture
def model(compressed):
    return compressed("llama", "svd")


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def same(model):
    return model


@pytest.mark.parametrize("change", [same, copy.deepcopy, pickled, through_torch])
def test_save_pretrained_guards_a_model_just_compressed_and_a_loaded_one(change, model, tmp_path):
    change(model).save_pretrained(tmp_path / "first")
    loaded = check(tmp_path / "first", outputs(model))
    change(loaded).save_pretrained(tmp_path / "second")
    check(tmp_path / "second", outputs(model))
    check(tmp_path / "first", outputs(model.base_model), AutoModel).save_pretrained(tmp_path / "b")
    check(tmp_path / "b", outputs(model.base_model), AutoModel)


def test_a_body_of_a_model_in_memory_is_guarded(model, tmp_path):
    """As sentence-transformers saves: by the module that it wraps."""
    model.base_model.save_pretrained(tmp_path)
    check(tmp_path, outputs(model.base_model), AutoModel)


@pytest.mark.parametrize("way", ["push", "save"])
def test_what_is_pushed_to_the_hub_is_guarded(way, model, tmp_path, monkeypatch):
    found = []

    def upload(self, folder, *args, **kwargs):
        found.append(json.loads(text_of(Path(folder))))

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Repo", (), {"repo_id": name})

        def __getattr__(self, name):
            raise AssertionError(name)

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_and_tag_model_card", lambda *a, **k: Card
    )
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: Card)
    if way == "push":
        model.push_to_hub("someone/something")
    else:
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/something")
    assert [config["transformers_weights"] for config in found] == [GUARD]


class Card:
    @staticmethod
    def save(path):
        pass


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def trainer(model, directory):
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=Rows())


def test_checkpoints_of_a_trainer_are_guarded_and_resumed(model, tmp_path):
    work = trainer(model, tmp_path / "run")
    work.train()
    check(tmp_path / "run" / "checkpoint-2", outputs(model.eval()))
    again = tnlm.load(tmp_path / "run" / "checkpoint-1")
    trainer(again, tmp_path / "run").train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
    )
    assert torch.allclose(outputs(again.eval()), outputs(model), atol=1e-5)
    work.save_model(str(tmp_path / "final"))
    check(tmp_path / "final", outputs(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_merged_adapter_is_guarded(model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["left", "right"])
    adapted = peft.get_peft_model(model, config)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    check(tmp_path, outputs(merged))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_dense_export_is_not_guarded(loaded, model, tmp_path):
    if loaded:
        model.save_pretrained(tmp_path / "compressed")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    dense = tnlm.to_dense(model)
    for name in ("dense", "again"):
        dense.save_pretrained(tmp_path / name)
        assert "tnlm" not in text_of(tmp_path / name).lower()
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_a_config_that_was_read_is_of_use(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config)
    assert torch.equal(outputs(loaded), outputs(model))
    config.save_pretrained(tmp_path / "config")
    assert is_guarded(tmp_path / "config")
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.save_pretrained(tmp_path / "fresh")  # it is dense
    assert "tnlm" not in text_of(tmp_path / "fresh").lower()
    AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")


def test_a_pipeline_reads_it(model, word_tokenizer, tmp_path):
    tnlm.save(model, tmp_path / "model", tokenizer=word_tokenizer)
    made = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    assert torch.equal(outputs(made.model), outputs(model))


def test_a_model_of_the_text_alone_stops_too(tmp_path):
    """Its config is the inner one, which says nothing of the factors."""
    from transformers import Gemma3ForCausalLM

    whole = tnlm.compress(families.make("gemma3"), "svd", progress=False)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(OSError, match=GUARD):
        Gemma3ForCausalLM.from_pretrained(tmp_path / "whole")
    loaded = type(whole).from_pretrained(tmp_path / "whole")
    tnlm.to_dense(loaded).save_pretrained(tmp_path / "dense")
    assert GUARD not in text_of(tmp_path / "dense")
    Gemma3ForCausalLM.from_pretrained(tmp_path / "dense")


def test_other_models_are_written_as_ever(make_model, tmp_path):
    dense = make_model("llama")
    before = json.dumps(dense.config.to_diff_dict())
    assert GUARD not in before
    dense.save_pretrained(tmp_path)
    assert "_tied_weights_keys" not in vars(dense)
    assert "_weight_conversions" not in vars(dense)


def test_saving_changes_nothing_in_memory(model, tmp_path, monkeypatch):
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    said = model.config.quantization_config
    model.save_pretrained(tmp_path / "one")
    model.base_model.save_pretrained(tmp_path / "two")
    monkeypatch.setattr(torch.nn.Module, "state_dict", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "three")
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert model.config.quantization_config is said
