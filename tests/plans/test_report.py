"""A report says what is needed to do the same again."""

from __future__ import annotations

import html
import json
import re

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


def test_plain_values_are_read_and_left_as_they_are(compressed):
    report = tnlm.report(compressed[0])
    told = json.loads(report.to_json())
    assert tnlm.Report.from_dict(told) == tnlm.Report.from_json(report.to_json())
    assert told == json.loads(report.to_json())
    with pytest.raises(OptionError, match="not a tnlm report"):
        tnlm.Report.from_dict({**told, "data": 3})


def test_reports_of_earlier_versions_are_read(compressed):
    model, _ = compressed
    told = json.loads(tnlm.report(model).to_json())
    for name in ("data", "fingerprint", "versions"):
        del told[name]
    read = tnlm.Report.from_json(json.dumps(told))
    assert (read.data, read.fingerprint, read.versions) == ({}, "", {})
    with pytest.raises(OptionError, match="not a tnlm report"):
        tnlm.Report.from_json(json.dumps({**told, "data": 3}))


@pytest.mark.parametrize(
    "refined", [[1], None, {"a": ["x", "y"]}, {"a": [None, 1]}, {"a": [1]}, {"a": 1}]
)
def test_broken_errors_of_blocks_are_an_option_error(refined, compressed):
    model, _ = compressed
    told = json.loads(tnlm.report(model).to_json())
    with pytest.raises(OptionError, match="not a tnlm report"):
        tnlm.Report.from_json(json.dumps({**told, "refined": refined}))


def recipe(model, folder):
    """Return the call that the page about a model shows."""
    page = tnlm.write_page(tnlm.save(model, folder)).read_text()
    return html.unescape(re.search(r"<h2>Recipe</h2>\s*<pre>(.*?)</pre>", page, re.S)[1])


def test_the_recipe_on_the_page_is_the_call(tiny_llama, tmp_path):
    asked = {"targets": ["q_proj", "up_proj"], "ignore": r".*\.1\..*", "metric": "input"}
    ids = torch.arange(400) % 50
    model = tnlm.compress(
        tiny_llama(), "kron", terms=2, **asked, calibration=ids, **DRAWN, progress=False
    )
    shown = recipe(model, tmp_path / "model")
    names = {"tnlm": tnlm, "model": tiny_llama(), "tokenizer": None}
    again = eval(shown.replace("calibration=...", "calibration=ids"), names | {"ids": ids})
    assert {layer.name for layer in tnlm.report(again).plan.layers if layer.format} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_recipe_of_a_search_is_its_plan(tiny_llama, word_tokenizer, word_text, tmp_path):
    texts = [[word_text(300, seed=seed)] for seed in range(3)]
    model = tiny_llama(num_hidden_layers=1)
    tnlm.rank_search(
        model,
        "perplexity",
        search=texts[0],
        report=texts[1],
        calibration=texts[2],
        tokenizer=word_tokenizer,
        targets=".*q_proj",
        max_length=16,
        growth=10.0,
        candidates=[0.5],
        progress=False,
    )
    shown = recipe(model, tmp_path / "model")
    assert shown.startswith("tnlm.compress(\n    model,\n    report.plan,\n    num_samples=")
    assert "search=" not in shown


def test_selectors_that_are_classes_are_not_written_down(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", targets=torch.nn.Linear, progress=False)
    assert "targets" not in tnlm.report(model).plan.request
