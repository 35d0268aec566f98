from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tnlm
from tests.hostile.draft import ODD
from tnlm.checkpoint.reports import add_report, known_report
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.errors import CheckpointError, ModelError


@pytest.fixture
def saved(compressed, tmp_path):
    return tnlm.save(compressed("llama", "svd", keep_targets=0.5), tmp_path / "model")


def healed(model):
    ids = torch.arange(24).reshape(2, 12) % 61 + 3
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return tnlm.heal(model, [batch], tokens=24, progress=False)


def test_a_model_without_a_report_is_saved_and_healed_again_and_again(saved, tmp_path):
    (saved / REPORT_FILE).unlink()
    first = tnlm.load(tnlm.save(tnlm.load(saved), tmp_path / "first"))
    with pytest.raises(ModelError, match="nor loaded from a directory with a report"):
        tnlm.report(first)
    again = tnlm.load(tnlm.save(healed(first), tmp_path / "again"))
    assert tnlm.verify(tmp_path / "again")
    tnlm.save(again, tmp_path / "last")


@pytest.mark.parametrize("text", [b'{"x": 1', b"\xff", b"[]", b'{"scheme": "svd"}'])
def test_a_damaged_report_is_left_out_with_a_warning(text, saved, tmp_path, caplog):
    (saved / REPORT_FILE).write_bytes(text)
    model = tnlm.load(saved)
    assert f"{REPORT_FILE} is left out" in caplog.text
    tnlm.save(healed(model), tmp_path / "again")
    with pytest.raises(CheckpointError, match=REPORT_FILE):
        tnlm.report(saved)


@pytest.mark.parametrize("name", ["seconds_by_stage", "parameters_before", "layers", "request"])
def test_an_odd_report_is_left_out_or_can_be_written(name, saved):
    found, model = json.loads((saved / REPORT_FILE).read_text()), nn.Module()
    for value in ODD:
        (saved / REPORT_FILE).write_text(json.dumps({**found, name: value}))
        model.tnlm_report = None
        add_report(model, saved)
        report = known_report(model)
        assert report is None or report.to_json()


def test_a_model_keeps_its_report_when_its_directory_is_written_again(saved, compressed, tmp_path):
    model = tnlm.load(saved)
    automatic = AutoModelForCausalLM.from_pretrained(saved)
    tnlm.save(compressed("llama", "svd", keep_targets=0.2), saved, overwrite=True)
    for number, loaded in enumerate((model, automatic)):
        again = tnlm.save(loaded, tmp_path / str(number))
        assert tnlm.report(again).parameters_after == model.num_parameters()


def test_a_directory_with_only_sums_says_that_it_has_no_report(saved, tmp_path):
    (saved / REPORT_FILE).unlink()
    again = tnlm.save(tnlm.load(saved), tmp_path / "again")
    for read in (tnlm.report, tnlm.write_page):
        with pytest.raises(CheckpointError, match=r"again has no report.*compress it again"):
            read(again)


def test_a_damaged_report_is_named(saved):
    (saved / REPORT_FILE).write_text('{"scheme": "svd"}')
    with pytest.raises(CheckpointError, match=f"model: {REPORT_FILE} is damaged: .*metric"):
        tnlm.report(saved)


def test_a_dense_model_has_no_report(saved):
    model = tnlm.load(saved)
    model.dequantize()
    with pytest.raises(ModelError):
        tnlm.report(model)
