"""A report says what is needed to do the same again."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import tnlm
from tnlm.errors import OptionError

DRAWN = {"num_samples": 4, "max_length": 16, "gradient_samples": 2, "seed": 7}


@pytest.fixture
def compressed(tiny_llama):
    ids = torch.arange(400) % 50
    model = tnlm.compress(tiny_llama(), "kfac-svd", calibration=ids, **DRAWN, progress=False)
    return model, ids


def test_it_says_how_data_was_drawn_and_with_which_versions(compressed):
    model, _ = compressed
    report = tnlm.report(model)
    assert report.data == DRAWN
    assert len(report.fingerprint) == 64
    assert report.versions["torch"] == torch.__version__
    assert report.versions["transformers"] == transformers.__version__
    assert report.versions["tnlm"] == tnlm.__version__
    again = tnlm.Report.from_json(report.to_json())
    assert (again.data, again.fingerprint, again.versions) == (
        report.data,
        report.fingerprint,
        report.versions,
    )


def test_the_plan_and_the_data_of_a_report_make_the_same_model(compressed, tiny_llama):
    model, ids = compressed
    read = tnlm.Report.from_json(tnlm.report(model).to_json())
    again = tnlm.compress(tiny_llama(), read.plan, calibration=ids, **read.data, progress=False)
    assert tnlm.report(again).fingerprint == read.fingerprint
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_tokens_have_another_fingerprint(compressed, tiny_llama):
    model, ids = compressed
    other = tnlm.compress(
        tiny_llama(), "kfac-svd", calibration=ids.flip(0), **DRAWN, progress=False
    )
    assert tnlm.report(other).fingerprint != tnlm.report(model).fingerprint


def test_training_data_has_a_fingerprint_too(tiny_llama, word_tokenizer, word_text):
    model = tnlm.compress(
        tiny_llama(),
        "svd",
        recover="finetune",
        recover_tokens=64,
        training=[word_text(200)],
        tokenizer=word_tokenizer,
        max_length=16,
        progress=False,
    )
    assert tnlm.report(model).data["max_length"] == 16
    assert len(tnlm.report(model).fingerprint) == 64


def test_without_data_there_is_nothing_to_say_of_it(tiny_llama):
    report = tnlm.report(tnlm.compress(tiny_llama(), "svd", progress=False))
    assert (report.data, report.fingerprint) == ({}, "")


def test_reports_of_earlier_versions_are_read(compressed):
    model, _ = compressed
    told = json.loads(tnlm.report(model).to_json())
    for name in ("data", "fingerprint", "versions"):
        del told[name]
    read = tnlm.Report.from_json(json.dumps(told))
    assert (read.data, read.fingerprint, read.versions) == ({}, "", {})
    with pytest.raises(OptionError, match="not a tnlm report"):
        tnlm.Report.from_json(json.dumps({**told, "data": 3}))
