from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from tnlm.checkpoint.raw import read
from tnlm.checkpoint.skeleton import open_skeleton
from tnlm.errors import CheckpointError, ModelError, OptionError


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2", "masked-bert"])
def test_a_skeleton_has_everything_but_the_values(kind, make_model, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    made, places = open_skeleton(tmp_path)
    assert type(made) is type(model)
    expected = dict(model.named_parameters())
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in expected.items()
    }
    for name, parameter in made.named_parameters():
        assert parameter.isnan().all()
        assert parameter.untyped_storage().nbytes() <= 8 or parameter.dim() == 1
        assert torch.equal(read(places[parameter]), expected[name])
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))
    assert not made.training


def test_the_config_and_the_generation_config_are_those_of_the_files(make_model, tmp_path):
    model = make_model("llama")
    model.generation_config.max_length = 77
    model.save_pretrained(tmp_path)
    made, _ = open_skeleton(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.config.to_dict() == loaded.config.to_dict()
    assert made.generation_config.to_dict() == loaded.generation_config.to_dict()


def test_a_head_that_the_files_hold_apart_from_its_table_is_noticed(make_model, tmp_path):
    model = copy.deepcopy(make_model("llama"))
    model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="two different ones"):
        open_skeleton(tmp_path)


def test_weights_that_transformers_keeps_in_float32_are_refused(tmp_path):
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"keeps .*\.wo\.weight in float32"):
        open_skeleton(tmp_path, "float16")
    with pytest.raises(OptionError, match="Allowed: auto"):
        open_skeleton(tmp_path, "float8")
