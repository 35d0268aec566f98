from __future__ import annotations

import pytest
from transformers import AlbertConfig, AlbertModel, ResNetConfig, ResNetModel

from tnlm.errors import ModelError
from tnlm.streaming.blocks import block_names, tensors_of


def test_blocks_and_what_is_around_them_are_all_tensors_once(make_model):
    model = make_model("tied-llama")
    blocks = block_names(model)
    assert blocks == ["model.layers.0", "model.layers.1"]
    parts = [tensors_of(model, block, blocks) for block in (*blocks, None)]
    assert parts[2] == ["model.embed_tokens.weight", "model.norm.weight"]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted({*model.state_dict()} - {"lm_head.weight"})


def test_layers_of_one_group_are_one_block():
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    shared = AlbertModel(AlbertConfig(**sizes, num_hidden_layers=2, num_hidden_groups=1))
    assert block_names(shared) == ["encoder.albert_layer_groups.0"]


def test_a_model_without_a_list_of_blocks_is_refused():
    model = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(ModelError, match="has no list of blocks"):
        block_names(model)
