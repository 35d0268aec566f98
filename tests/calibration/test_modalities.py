"""Models of images, of sound, of these beside text, and of pairs: calibrated on their own data."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tnlm.calibration import walk
from tnlm.calibration.data import token_batches
from tnlm.calibration.loss import make_tasks
from tnlm.calibration.passes import run
from tnlm.calibration.walk import stream
from tnlm.compression.gather import UNREACHED
from tnlm.errors import CalibrationError
from tnlm.targets.selection import select

SHOWN = torch.Generator().manual_seed(0)
IMAGES = torch.randn(4, 3, 16, 16, generator=SHOWN)
WAVES = torch.randn(4, 200, generator=SHOWN)
MELS = torch.randn(4, 8, 32, generator=SHOWN)
IDS = torch.randint(3, 66, (4, 12), generator=SHOWN)
SEEN = torch.cat([torch.full((4, 4), 69), IDS], 1)
PATCHES = torch.randn(4 * 16, 3 * 2 * 4 * 4, generator=SHOWN)
SHORT = torch.tensor([[3, 4], [5, -100], [6, 7], [8, 9]])

IMAGE = {"pixel_values": IMAGES}
CLASSES = {"labels": torch.tensor([0, 1, 2, 0])}
MULTIMODAL = {
    "llava": {"input_ids": SEEN, "pixel_values": IMAGES},
    "qwen2-vl": {
        "input_ids": torch.cat([torch.full((4, 1), 67), SEEN], 1),
        "pixel_values": PATCHES,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, *[0] * 12]] * 4),
    },
    "clip": {"input_ids": IDS, "pixel_values": IMAGES},
}
DATA = MULTIMODAL | {
    "vit": IMAGE,
    "dinov2": IMAGE,
    "clip-vision": IMAGE,
    "vit-classes": IMAGE | CLASSES,
    "wav2vec2": {"input_values": WAVES},
    "wav2vec2-ctc": {"input_values": WAVES, "labels": SHORT.clamp_min(1)},
    "wav2vec2-classes": {"input_values": WAVES} | CLASSES,
    "whisper": {"input_features": MELS, "labels": SHORT},
    "t5": {"input_ids": IDS, "labels": IDS.flip(1)},
}
PREDICT = ("vit-classes", "wav2vec2-ctc", "wav2vec2-classes", "whisper", "t5", "llava", "qwen2-vl")
OPTIONS = {"keep_targets": 0.6, "progress": False}


def modules_of(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


@pytest.mark.parametrize("kind", DATA)
def test_all_that_is_compressed_is_reached(kind, make_tiny):
    model = tnlm.compress(make_tiny(kind), "svd-llm", calibration=DATA[kind], **OPTIONS)
    report = tnlm.report(model)
    assert UNREACHED not in report.plan.skipped.values()
    assert report.plan.targets_after.params < report.plan.targets_before.params


@pytest.mark.parametrize("kind", PREDICT)
def test_gradients_come_from_what_the_model_predicts(kind, make_tiny):
    model = tnlm.compress(make_tiny(kind), "auto", calibration=DATA[kind], **OPTIONS)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert tnlm.report(model).plan.targets_after.params > 0


@pytest.mark.parametrize("kind", ["vit", "wav2vec2", "clip"])
def test_models_without_a_head_predict_nothing(kind, make_tiny):
    with pytest.raises(CalibrationError, match="need a model with an output head"):
        tnlm.compress(make_tiny(kind), "auto", calibration=DATA[kind], **OPTIONS)


@pytest.mark.parametrize(("kind", "walked"), [
    ("vit", 1), ("dinov2", 1), ("clip-vision", 1), ("wav2vec2", 1), ("whisper", 1), ("t5", 1),
    ("llava", 2), ("qwen2-vl", 2), ("clip", 2),
])  # fmt: skip
def test_each_tower_is_walked_and_shows_what_whole_passes_show(
    kind, walked, make_tiny, monkeypatch
):
    model, walks = make_tiny(kind), []
    data = [DATA[kind]] * 2 if kind in MULTIMODAL else DATA[kind]
    batches = token_batches(data, model=model)
    batches = [b for b in batches if b.get("labels", SHORT[:1]).shape[-1] != 1]  # one shape
    modules = modules_of(model)
    real = walk._walk
    monkeypatch.setattr(walk, "_walk", lambda *args: walks.append(1) or real(*args))
    found, expected = {}, {}
    for store, blocks in ((found, walk.find_stacks), (expected, lambda *_: [])):
        monkeypatch.setattr(walk, "find_stacks", blocks)
        see = lambda name, x, _, store=store: store.setdefault(name, []).append(x.clone())  # noqa: E731
        done = sum(stream(model, modules, batches, see))
        assert done == pytest.approx(len(batches))
    assert len(walks) == walked
    assert found.keys() == expected.keys()
    for name, inputs in found.items():
        for one, other in zip(inputs, expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["svd-llm", "auto"])
@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_text_leaves_the_tower_of_images_dense_with_one_warning(kind, scheme, make_tiny, caplog):
    model = make_tiny(kind)
    ids = torch.arange(600) % 60 + 3
    tnlm.compress(model, scheme, calibration=ids, max_length=16, **OPTIONS)
    dense = [record for record in caplog.records if "stay dense" in record.getMessage()]
    assert len(dense) == 1
    assert "vision_tower" in dense[0].getMessage()
    assert model.config.get_text_config().use_cache is True
    assert all("vision" in name or "projector" in name for name in tnlm.report(model).plan.skipped)


def test_media_tokens_are_not_predicted(make_tiny):
    [batch] = token_batches(DATA["llava"], model=make_tiny("llava"))
    [task] = make_tasks(make_tiny("llava"), [batch], "data")
    assert task.labels[:, :3].unique().tolist() == [-100]
    assert torch.equal(task.labels[:, 3:-1], IDS)


def test_half_precision_takes_images_in_its_own_dtype(make_tiny):
    model = make_tiny("vit-classes").to(torch.bfloat16)
    tnlm.compress(model, "svd-llm", calibration=DATA["vit-classes"], **OPTIONS)


def test_what_a_decoder_reads_is_the_labels_moved_on(make_tiny):
    batch = {"input_features": MELS[:1], "labels": torch.tensor([[5, 6, 2]])}
    model = make_tiny("whisper")
    expected = model(MELS[:1], decoder_input_ids=torch.tensor([[1, 5, 6]])).logits
    torch.testing.assert_close(run(model, batch).logits, expected)


def test_statistics_of_images_are_cached(make_tiny, tmp_path):
    cached = {"cache_dir": tmp_path, **OPTIONS}
    first = tnlm.compress(make_tiny("vit"), "svd-llm", calibration=IMAGE, **cached)
    entries = sorted(tmp_path.iterdir())
    second = tnlm.compress(make_tiny("vit"), "svd-llm", calibration=IMAGE, **cached)
    assert sorted(tmp_path.iterdir()) == entries
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_rows_are_counted_and_not_images(make_tiny, caplog):
    tnlm.compress(make_tiny("vit"), "svd-llm", calibration=torch.cat([IMAGES] * 3), **OPTIONS)
    assert "calibration tokens for matrices" not in caplog.text
