"""Compressed files hold run-time names in every family, and dense exports the family's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

import tnlm
from tests.integrations import families

FAMILIES = list(families.FAMILIES)
outputs = families.outputs


def compressed(family, scheme="svd", **options):
    return tnlm.compress(families.make(family), scheme, progress=False, **options)


def names(directory):
    return {
        name
        for file in Path(directory).glob("*.safetensors")
        for name in safe_open(file, "pt").keys()  # noqa: SIM118
    }


def read(cls, directory):
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def check_saves(model, directory):
    """Check that a model saves and loads, twice, and that its dense form is a plain checkpoint."""
    expected = outputs(model)
    model.save_pretrained(directory / "first")
    assert names(directory / "first") <= model.state_dict().keys()
    loaded = read(type(model), directory / "first")
    assert torch.equal(outputs(loaded), expected)
    copy.deepcopy(loaded).save_pretrained(directory / "second")
    assert names(directory / "second") == names(directory / "first")
    again = read(type(model), directory / "second")
    assert torch.equal(outputs(again), expected)
    return again


def check_dense(model, original, directory):
    """Check that the dense form has the names on disk that the original has."""
    expected = outputs(tnlm.to_dense(model))
    model.save_pretrained(directory / "dense")
    original.save_pretrained(directory / "original")
    assert names(directory / "dense") == names(directory / "original")
    assert "tnlm" not in (directory / "dense" / "config.json").read_text().lower()
    assert torch.equal(outputs(read(type(model), directory / "dense")), expected)


# Names in files depend on the family, and those of factors on the format: no need of the product.
@pytest.mark.parametrize(
    ("family", "scheme"),
    [*((family, "svd") for family in FAMILIES), *((family, "kron") for family in FAMILIES[::3])],
)
def test_a_family_is_saved_and_loaded(family, scheme, tmp_path):
    model = compressed(family, scheme)
    again = check_saves(model, tmp_path)
    check_dense(again, families.make(family), tmp_path)


@pytest.mark.parametrize("family", ["nomic_bert", "mixtral", "llava", "vit"])
def test_a_model_just_compressed_is_exported_under_its_old_names(family, tmp_path):
    check_dense(compressed(family), families.make(family), tmp_path)


@pytest.mark.parametrize("scheme", ["albert", "tensorgpt", "shapeshifter"])
@pytest.mark.parametrize("family", ["tied-llama", "nomic_bert", "bert"])
def test_factored_tables_are_saved_and_loaded(family, scheme, tmp_path):
    check_saves(compressed(family, scheme), tmp_path)


@pytest.mark.parametrize("scheme", ["auto", "modegpt"])
@pytest.mark.parametrize("family", ["nomic_bert", "mixtral", "qwen2_moe"])
def test_schemes_with_data_are_saved_and_loaded(family, scheme, tmp_path):
    data = {"calibration": torch.arange(256) % 61 + 3, "max_length": 16}
    check_saves(compressed(family, scheme, **data), tmp_path)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("dinov2", "weights_in|gate_proj"),
        ("nomic_bert", "q_proj"),
        ("nomic_bert", "up_proj"),
        ("mixtral", "o_proj"),
        ("qwen2_moe", "shared_expert.gate_proj"),
    ],
)
def test_a_part_of_a_group_that_is_fused_on_disk(family, target, tmp_path):
    model = compressed(family, targets=rf".*({target})", keep_targets=0.5)
    expected = outputs(model)
    check_saves(model, tmp_path)
    body = AutoModel.from_pretrained(tmp_path / "first")
    wanted = model.base_model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in body.state_dict().items()
               if "pooler" not in name)  # fmt: skip
    check_dense(model, families.make(family), tmp_path)
    assert not torch.equal(expected, outputs(families.make(family)))


@pytest.mark.parametrize("family", ["nomic_bert", "vit", "clip_vision", "llava", "mixtral"])
def test_a_model_that_was_loaded_keeps_the_names_of_its_file(family, tmp_path):
    families.make(family).save_pretrained(tmp_path / "file")
    model = type(families.make(family)).from_pretrained(tmp_path / "file")
    tnlm.compress(model, "svd", progress=False)
    model.save_pretrained(tmp_path / "compressed")
    tnlm.to_dense(model).save_pretrained(tmp_path / "dense")
    assert names(tmp_path / "dense") == names(tmp_path / "file")


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("llama", "model"),
        ("mixtral", "model"),
        ("nomic_bert", "nomic_bert"),
        ("llava", "model"),
        ("llava", "model.language_model"),
        ("llava", "model.vision_tower"),
        ("gemma3", "model.language_model"),
        ("gemma3", "model.vision_tower"),
        ("t5", "encoder"),
        ("bart", "model.encoder"),
    ],
)
def test_a_part_is_saved_alone(family, part, tmp_path):
    whole = compressed(family)
    model = whole.get_submodule(part)
    model.save_pretrained(tmp_path / "part")
    loaded = read(type(model), tmp_path / "part")
    assert loaded.hf_quantizer.quantization_config.modules
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    check_saves(whole, tmp_path)  # which was not changed by it


def test_a_part_with_shared_factors_is_saved_alone(tmp_path):
    data = {"calibration": torch.arange(256) % 61 + 3, "max_length": 16}
    whole = compressed("llama", "basis-sharing", **data)
    whole.model.save_pretrained(tmp_path)
    loaded = read(type(whole.model), tmp_path)
    assert torch.equal(outputs(loaded), outputs(whole.model))
    assert loaded.num_parameters() == whole.model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "nomic_bert", "llava", "t5"])
def test_a_model_around_a_compressed_body_is_saved(family, tmp_path):
    whole = families.make(family)
    tnlm.compress(whole.base_model if family != "t5" else whole.encoder, "svd", progress=False)
    check_saves(whole, tmp_path)
