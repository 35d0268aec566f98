"""What a model takes of the data: columns that are carried, passed over and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BatchFeature

import tnlm
from tnlm.calibration.caching import caches_kept, configs_of
from tnlm.calibration.data import count_tokens, fingerprint, token_batches
from tnlm.calibration.sequences import sequences_of
from tnlm.errors import CalibrationError

ROW = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
IMAGES = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16) / 1000


def test_every_config_is_found_and_restored_after_a_failure(make_tiny):
    model = make_tiny("gemma3")
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
        IMAGES,
        {"pixel_values": IMAGES},
        BatchFeature({"pixel_values": list(IMAGES.numpy())}),
        [{"pixel_values": image} for image in IMAGES],
        [{"pixel_values": IMAGES[:1].tolist()}, {"pixel_values": IMAGES[1:]}],
        DataLoader([{"pixel_values": image, "idx": 1} for image in IMAGES], batch_size=2),
        Dataset.from_dict({"pixel_values": IMAGES.tolist()}).with_format("torch"),
    ],
    ids=["tensor", "batch", "feature", "rows", "lists", "loader", "dataset"],
)
def test_images_of_all_forms_are_batches_of_one(data, make_tiny):
    batches = token_batches(data, model=make_tiny("vit"), batch_size=4)
    assert [list(batch) for batch in batches] == [["pixel_values"]] * 2
    found = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(found, IMAGES)
    assert count_tokens(batches) == 2


def test_the_fingerprint_covers_whatever_a_batch_holds(make_tiny):
    model = make_tiny("vit")
    first, same = (fingerprint(token_batches(IMAGES, model=model)) for _ in range(2))
    assert first == same
    assert first != fingerprint(token_batches(IMAGES + 1, model=model))
    halves = [{"pixel_values": IMAGES.bfloat16()}]
    assert fingerprint(halves) != fingerprint([{"pixel_values": IMAGES}])


def test_clips_are_trimmed_of_padding(make_tiny):
    sound = {
        "input_values": torch.arange(200.0).reshape(2, 100),
        "attention_mask": torch.tensor([[1] * 100, [1] * 60 + [0] * 40]),
    }
    batches = token_batches(sound, model=make_tiny("wav2vec2"), max_length=10)
    assert [batch["input_values"].shape for batch in batches] == [(1, 100), (1, 60)]


def test_text_beside_images_stays_whole_and_counts_its_tokens(make_tiny):
    ids = torch.tensor([[69, 69, 69, 69, 5, 6], [69, 69, 69, 69, 5, 0]])
    data = BatchEncoding(
        {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": IMAGES}
    )
    [batch] = token_batches(data, model=make_tiny("llava"), max_length=2)
    assert torch.equal(batch["input_ids"], ids)
    assert count_tokens([batch]) == 11
    with pytest.raises(CalibrationError, match="give each its own batch"):
        sequences_of(batch)


def test_pairs_are_trimmed_and_cut_on_both_sides(make_tiny):
    data = {
        "input_ids": torch.tensor([[3, 4, 5, 6, 1], [7, 8, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[9, 9, 1, -100], [9, 9, 9, 1]]),
    }
    first, second = token_batches(data, model=make_tiny("t5"), max_length=4, batch_size=8)
    assert first["input_ids"].tolist() == [[3, 4, 5, 6]]
    assert first["labels"].tolist() == [[9, 9, 1]]
    assert (second["input_ids"].tolist(), second["labels"].shape) == ([[7, 8]], (1, 4))
    assert count_tokens([first, second]) == 4 + 3 + 2 + 4
    [alone] = token_batches([{"input_ids": [3, 4], "labels": [9]}], model=make_tiny("t5"))
    assert alone["labels"].tolist() == [[9]]


def test_pairs_of_texts_are_for_models_that_write_the_second(make_tiny, word_tokenizer):
    pairs = [("word0 word1 word2", "word3"), ("word4", "word5 word6")]
    batches = token_batches(pairs, word_tokenizer, model=make_tiny("t5"), max_length=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[3, 4]], [[7]]]
    assert [batch["labels"].tolist() for batch in batches] == [[[6]], [[8, 9]]]
    with pytest.raises(CalibrationError, match="an encoder and a decoder share"):
        token_batches(pairs, word_tokenizer, model=make_tiny("llama"))
    with pytest.raises(CalibrationError, match="tokenizer="):
        token_batches(pairs, model=make_tiny("t5"))


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("vit", {"images": IMAGES}, r"keys \['images'\]; a ViTModel needs 'pixel_values'; give"),
        ("vit", torch.arange(8), "does not run on|needs 'pixel_values'"),
        ("whisper", {"input_ids": [[1]]}, "needs 'input_features'"),
        ("llava", {"pixel_values": IMAGES}, "needs 'input_ids'"),
        ("llama", ROW | {"pixel_values": IMAGES}, "not a LlamaForCausalLM's; leave the column"),
        ("vit", {"pixel_values": [IMAGES[0], IMAGES[1, :, :8]]}, r"several sizes .*\(3, 8, 16\)"),
        ("vit", {"pixel_values": [IMAGES[0].numpy(), np.zeros((3, 8, 8))]}, "several sizes"),
        ("vit", {"pixel_values": "cat.png"}, "'pixel_values' is a str, not a tensor"),
        ("vit", {"pixel_values": IMAGES.to("meta")}, "dense tensor with data"),
        ("wav2vec2", {"input_values": [[0.5, 1.0], [0.5]]}, "not a tensor"),
    ],
)
def test_data_that_does_not_suit_the_model_is_a_clear_error(kind, data, message, make_tiny):
    model = make_tiny(kind)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(CalibrationError, match=message):
        tnlm.compress(model, "svd-llm", calibration=data, keep_targets=0.5, progress=False)
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_a_model_that_lacks_an_input_says_what_it_was_given(make_tiny):
    options = {"keep_targets": 0.5, "progress": False}
    with pytest.raises(CalibrationError, match=r"CLIPModel does not run on input_ids \(1, 4\)"):
        tnlm.compress(make_tiny("clip"), "svd-llm", calibration=ROW, **options)
    sound = {"input_features": torch.zeros(1, 8, 32)}
    with pytest.raises(CalibrationError, match="add labels or decoder_input_ids"):
        tnlm.compress(make_tiny("whisper"), "svd-llm", calibration=sound, **options)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_columns_of_tokens_are_carried_and_cut_with_them(name, make_model):
    row = {"input_ids": [[3, 4, 5, 0]], "attention_mask": [[1, 1, 1, 0]]}
    [batch] = token_batches([row | {name: [[0, 0, 1, 2]]}], model=make_model("masked-bert"))
    assert batch[name].tolist() == [[0, 0, 1]]
    harmless = {"token_type_ids": [[0, 0, 0, 0]], "position_ids": [[0, 1, 2, 3]]}[name]
    [batch] = token_batches([row | {name: harmless}], model=make_model("masked-bert"))
    assert list(batch) == ["input_ids", "attention_mask"]


def test_columns_that_the_model_does_not_take_are_no_inputs(tiny_llama):
    row = ROW | {"special_tokens_mask": [[1, 0, 0, 0]], "idx": 3, "token_type_ids": [[0, 1, 1, 1]]}
    [batch] = token_batches([row], model=tiny_llama())
    assert list(batch) == ["input_ids", "attention_mask"]


def test_training_takes_text_alone(make_tiny):
    data = ROW | {"pixel_values": IMAGES[:1]}
    with pytest.raises(CalibrationError, match="'pixel_values', which would be lost: training"):
        tnlm.compress(
            make_tiny("llava"), "svd", training=data, rank=2, recover="lora", progress=False
        )
    with pytest.raises(CalibrationError, match="'pixel_values', which would be lost: only text"):
        token_batches(data)
