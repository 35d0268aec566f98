"""Text that a model writes itself."""

from __future__ import annotations

import math

import pytest
import torch

import tnlm
from tnlm.calibration import generated
from tnlm.calibration.data import fingerprint, token_batches
from tnlm.calibration.generated import own_samples
from tnlm.errors import CalibrationError, OptionError


def ids_of(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def write(model, count=6, length=12, **options):
    return ids_of(own_samples(model, count, length, **options))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_repeats_by_its_seed_whatever_is_written_at_once(kind, make_model, monkeypatch):
    model = make_model(kind)
    first = write(model)
    assert first.shape == (6, 12)
    assert bool((first[:, 0] == model.config.bos_token_id).all())
    assert len(first[:, 1:].unique()) > 20
    assert torch.equal(write(model), first)
    assert torch.equal(write(model, count=3), first[:3])
    monkeypatch.setattr(generated, "TOGETHER", 2)
    assert torch.equal(write(model), first)
    assert not torch.equal(write(model, seed=1), first)


def test_tokens_are_drawn_from_the_models_distribution(tiny_llama):
    model = tiny_llama(vocab_size=4, num_hidden_layers=1, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_(std=2.0)
    found = write(model, count=2000, length=2)[:, 1].bincount(minlength=4) / 2000
    expected = model(torch.tensor([[1]])).logits[0, 0].softmax(-1)
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)
    cold = write(model, count=50, length=2, temperature=1e-3)[:, 1]
    assert cold.unique().tolist() == [int(expected.argmax())]


def test_first_tokens_are_random_where_there_is_no_bos(tiny_llama):
    model = tiny_llama(bos_token_id=None, eos_token_id=None)
    assert len(write(model, count=20, length=3)[:, 0].unique()) > 5
    assert len(write(tiny_llama(), count=20, length=3, bos=False)[:, 0].unique()) > 5
    with pytest.raises(OptionError, match="has no BOS token"):
        write(model, bos=True)


def test_the_model_is_left_as_it_was(tiny_gpt2):
    model = tiny_gpt2().train()
    before, config = model.generation_config, model.generation_config.to_dict()
    write(model)
    assert model.generation_config is before
    assert before.to_dict() == config
    assert model.training
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(CalibrationError, match="logits are not finite"):
        write(model)
    assert model.generation_config is before


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("masked-bert", "texts or a text file"),
        ("bert", "texts or a text file"),
        ("t5", "pairs of texts"),
        ("vit", "batches with pixel_values"),
        ("whisper", "batches with input_features"),
    ],
)
def test_models_that_do_not_write_say_what_to_give(kind, remedy, make_model, make_tiny):
    model = make_model(kind) if "bert" in kind else make_tiny(kind)
    with pytest.raises(CalibrationError, match=f"does not generate text .*; give {remedy}"):
        tnlm.compress(model, "svd-llm", calibration="self", keep_targets=0.5, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, OptionError, "temperature=0"),
        ({"temperature": math.inf}, OptionError, "temperature=inf"),
        ({"temperature": True}, OptionError, "temperature=True"),
        ({"bos": "yes"}, OptionError, "bos='yes'"),
        ({"max_length": 129}, CalibrationError, "use max_length<=128"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message, tiny_gpt2):
    with pytest.raises(error, match=message):
        tnlm.compress(tiny_gpt2(), "svd-llm", calibration="self", rank=4, **options)


def test_temperature_without_own_text_is_refused(tiny_llama):
    ids = torch.arange(64) % 60 + 3
    with pytest.raises(OptionError, match="temperature= is for calibration='self'"):
        tnlm.compress(tiny_llama(), "svd-llm", calibration=ids, temperature=0.5, rank=4)
    with pytest.raises(OptionError, match="temperature= is for calibration='self'"):
        token_batches(ids, temperature=0.5)
    with pytest.raises(CalibrationError, match="needs the model"):
        token_batches("self")


def test_compression_repeats_and_its_report_says_how(tiny_llama, tmp_path):
    options = {"calibration": "self", "num_samples": 4, "max_length": 16, "keep_targets": 0.6}
    options |= {"progress": False, "cache_dir": tmp_path, "temperature": 0.8}
    first = tnlm.compress(tiny_llama(), "auto", **options)
    again = tnlm.compress(tiny_llama(), "auto", **options | {"cache_dir": tmp_path / "other"})
    assert tnlm.report(first).data["temperature"] == 0.8
    assert tnlm.report(first).fingerprint == tnlm.report(again).fingerprint
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert all(bool(tensor.isfinite().all()) for tensor in first.state_dict().values())


def test_text_is_kept_in_the_cache(tiny_llama, tmp_path, monkeypatch):
    first = own_samples(tiny_llama(), 3, 8, cache_dir=tmp_path)
    monkeypatch.setattr(generated, "_written", None)
    again = own_samples(tiny_llama(), 3, 8, cache_dir=tmp_path)
    assert fingerprint(first) == fingerprint(again)
    with pytest.raises(TypeError):
        own_samples(tiny_llama(seed=1), 3, 8, cache_dir=tmp_path)


def test_a_file_of_that_name_is_named_with_its_folder(
    tmp_path, monkeypatch, word_text, tiny_llama, word_tokenizer
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text(word_text(64))
    options = {"max_length": 8, "model": tiny_llama()}
    written = token_batches("self", word_tokenizer, num_samples=8, **options)
    read = token_batches("./self", word_tokenizer, num_samples=8, **options)
    assert fingerprint(written) != fingerprint(read)


def test_training_on_own_text(tiny_llama):
    options = {"recover": "lora", "recover_tokens": 64, "max_length": 16, "progress": False}
    model = tnlm.compress(tiny_llama(), "svd", rank=4, training="self", **options)
    assert tnlm.report(model).data["temperature"] == 1.0


def test_kron_takes_the_models_own_text(tiny_llama):
    options = {"terms": 4, "num_samples": 8, "max_length": 16, "progress": False}
    model = tnlm.compress(tiny_llama(), "kron", calibration="self", **options)
    assert tnlm.report(model).plan.metric == "two-sided"
    free = tnlm.compress(tiny_llama(), "kron", terms=4, progress=False)
    assert tnlm.report(free).plan.metric == "identity"
