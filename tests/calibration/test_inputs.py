"""Models of text and images: calibrated on text alone, and never on a part of what is given."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import tnlm
from tnlm.calibration import walk
from tnlm.calibration.caching import caches_kept, configs_of
from tnlm.calibration.data import token_batches
from tnlm.errors import CalibrationError

TEXT = {
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IDS = torch.arange(128) % 60 + 3
TARGETS = r".*language_model.*(q_proj|up_proj)"
ROW = {"input_ids": torch.tensor([[3, 4, 5, 6]])}


def gemma3():
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=TEXT | {"head_dim": 8, "sliding_window": 8},
            vision_config=IMAGES,
            mm_tokens_per_image=4,
            image_token_index=69,
            boi_token_index=68,
            eoi_token_index=67,
        )
    ).eval()


def llava():
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=IMAGES | {"model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=69,
        )
    ).eval()


@pytest.mark.parametrize("make", [gemma3, llava])
@pytest.mark.parametrize("scheme", ["svd-llm", "auto"])
def test_text_is_walked_without_a_cache_which_is_restored(make, scheme, monkeypatch):
    model, whole = make(), []
    passes = walk._whole
    monkeypatch.setattr(walk, "_whole", lambda *args: whole.append(1) or passes(*args))
    tnlm.compress(
        model,
        scheme,
        targets=TARGETS,
        calibration=IDS,
        max_length=16,
        keep_targets=0.6,
        progress=False,
    )
    assert not whole
    assert model.config.get_text_config().use_cache is True


def test_every_config_is_found_and_restored_after_a_failure():
    model = gemma3()
    caches = [c for c in configs_of(model) if getattr(c, "use_cache", None) is not None]
    assert model.config.text_config in caches
    seen = []

    def fail():
        with caches_kept(model, use=False):
            seen.extend(config.use_cache for config in caches)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert all(config.use_cache for config in caches)


@pytest.mark.parametrize(
    "data",
    [
        [ROW | {"pixel_values": torch.zeros(1, 3, 16, 16)}],
        ROW | {"pixel_values": torch.zeros(1, 3, 16, 16)},
        DataLoader([{"input_ids": [3, 4], "pixel_values": [0.0]}], collate_fn=lambda rows: rows[0]),
        Dataset.from_dict({"input_ids": [[3, 4]], "pixel_values": [[0.5]]}),
    ],
    ids=["rows", "batch", "loader", "dataset"],
)
def test_images_are_refused_and_not_lost(data):
    model = llava()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    for call in (
        lambda: tnlm.compress(
            model, "svd-llm", targets=TARGETS, calibration=data, rank=2, progress=False
        ),
        lambda: tnlm.compress(
            model, "svd", targets=TARGETS, training=data, rank=2, recover="lora", progress=False
        ),
        lambda: tnlm.analyze(model, data, targets=TARGETS, progress=False),
        lambda: token_batches(data),
    ):
        with pytest.raises(CalibrationError, match="'pixel_values', which would be lost"):
            call()
    assert all(map(torch.equal, before, model.state_dict().values()))


@pytest.mark.parametrize(
    ("column", "harmless", "harmful"),
    [
        ("token_type_ids", [[0, 0, 0, 0]], [[0, 0, 1, 1]]),
        ("position_ids", [[0, 1, 2, 3]], [[0, 0, 1, 2]]),
    ],
)
def test_columns_that_say_nothing_new_may_be_there(column, harmless, harmful, make_model):
    model = make_model("masked-bert")
    expected = token_batches([ROW], model=model)[0]["input_ids"]
    found = token_batches([ROW | {column: harmless}], model=model)
    assert torch.equal(found[0]["input_ids"], expected)
    with pytest.raises(CalibrationError, match=f"'{column}', which would be lost"):
        token_batches([ROW | {column: harmful}], model=model)


def test_columns_that_the_model_does_not_take_are_no_inputs(tiny_llama):
    row = ROW | {"special_tokens_mask": [[1, 0, 0, 0]], "idx": 3, "token_type_ids": [[0, 1, 1, 1]]}
    assert len(token_batches([row], model=tiny_llama())) == 1
