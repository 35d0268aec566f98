"""What could not be loaded again is not written, least of all over a model that can."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tnlm
from tnlm.errors import CheckpointError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

QUERY = "model.layers.0.self_attn.q_proj"


def lose(model):
    model.get_parameter(f"{QUERY}.left.weight").data[0, 0] = float("nan")


def disorder(model):
    model.get_submodule(QUERY).right_order.zero_()


def put_dense_back(model):
    model.set_submodule(QUERY, nn.Linear(32, 32, bias=False))


def add_bias(model):
    left = model.get_submodule(QUERY).left
    left.bias = nn.Parameter(torch.ones(len(left.weight)))


def drop_layer(model):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def adapt(model):
    get_peft_model(model, LoraConfig(target_modules=["lm_head"]))


CHANGES = {
    lose: "q_proj.left.weight has values that are not finite",
    disorder: "q_proj.right_order is no permutation",
    put_dense_back: "q_proj was changed after the model was compressed",
    add_bias: "q_proj was changed after the model was compressed",
    drop_layer: "names a module 'model.layers.1",
    adapt: r"lm_head has a PEFT adapter.*merge_and_unload\(\)",
}


@pytest.mark.parametrize(
    ("change", "told"), CHANGES.items(), ids=[change.__name__ for change in CHANGES]
)
def test_a_model_that_could_not_be_loaded_leaves_the_old_one(change, told, compressed, tmp_path):
    directory = tnlm.save(compressed("llama", "svd"), tmp_path / "model")
    before = tnlm.verify(directory)
    model = compressed("llama", "svd")
    change(model)
    with pytest.raises(ModelError, match=told):
        tnlm.save(model, directory, overwrite=True)
    assert tnlm.verify(directory) == before


def test_a_model_in_an_adapter_is_not_saved_as_the_adapter_alone(compressed, tmp_path):
    model = get_peft_model(compressed("llama", "svd"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        tnlm.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    tnlm.load(tnlm.save(model.merge_and_unload(), tmp_path / "model"))


def test_a_process_that_is_not_the_main_one_leaves_the_directory(compressed, tmp_path):
    directory = tnlm.save(compressed("llama", "svd"), tmp_path / "model")
    before = tnlm.verify(directory)
    tnlm.save(compressed("llama", "svd"), directory, overwrite=True, is_main_process=False)
    assert tnlm.verify(directory) == before
    tnlm.save(compressed("llama", "svd"), tmp_path / "new", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["a" * 300, "b" * 250, "a\0b"], ids=["long", "beside", "null"])
def test_a_name_that_no_directory_can_have_is_refused(name, compressed, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        tnlm.save(compressed("llama", "svd"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_directory_can_have_is_not_verified():
    with pytest.raises(CheckpointError, match="is not a directory"):
        tnlm.verify("a" * 5000)


def test_a_generation_config_that_transformers_refuses_is_named(compressed, tmp_path):
    model = compressed("llama", "svd")
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ModelError, match=r"(?s)generation_config is invalid.*temperature"):
        tnlm.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
