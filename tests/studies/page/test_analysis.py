"""The page about an analysis: it stands alone, and shows every matrix and figure."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

import tnlm
from tnlm.errors import CheckpointError
from tnlm.studies.page.analysis import write_analysis

DATA = {"max_length": 16, "progress": False}
IDS = torch.arange(256) % 30 + 3


@pytest.fixture
def analyses(tiny_llama):
    """Return the analyses of a compressed model and of the dense one."""
    dense = tiny_llama()
    small = tnlm.compress(copy.deepcopy(dense), "svd", keep_targets=0.4, progress=False)
    return tnlm.analyze(small, IDS, **DATA), tnlm.analyze(dense, IDS, **DATA)


def test_the_page_stands_alone_and_has_every_matrix(analyses, tmp_path):
    found, before = analyses
    text = write_analysis(found, tmp_path / "page.html", before=before).read_text()
    assert not re.search(r"""(?:src|href)=["']https?:""", text)
    assert text.count("<svg") == 3
    for row in found.weights:
        assert f"<td>{row.name}</td>" in text
    assert "before" in text
    assert "after" in text


def test_without_data_there_are_no_features(tiny_llama, tmp_path):
    found = tnlm.analyze(tiny_llama(), formats=["low-rank"], progress=False)
    text = write_analysis(found, tmp_path / "page.html").read_text()
    assert "<h2>Features</h2>" not in text
    assert "<h2>Errors of formats</h2>" in text


def test_the_name_of_the_model_is_escaped(tiny_llama, tmp_path):
    found = tnlm.analyze(tiny_llama(), targets=["up_proj"], progress=False)
    found = dataclasses.replace(found, protocol={**found.protocol, "model": "<b>&"})
    text = write_analysis(found, tmp_path / "page.html").read_text()
    assert "<h1>Analysis of &lt;b&gt;&amp;</h1>" in text


def test_a_place_that_cannot_be_written_is_an_error(tiny_llama, tmp_path):
    found = tnlm.analyze(tiny_llama(), targets=["up_proj"], progress=False)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_analysis(found, tmp_path / "nowhere" / "page.html")


def test_what_factors_stand_for_is_analyzed_and_the_model_stays(analyses, tiny_llama):
    small = tnlm.compress(tiny_llama(), "svd", keep_targets=0.4, progress=False)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    found = tnlm.analyze(small, IDS, **DATA)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    dense = analyses[1]
    assert [row.name for row in found.weights] == [row.name for row in dense.weights]
    ranks = {layer.name: layer.spec["rank"] for layer in tnlm.report(small).plan.layers}
    for row in found.weights:
        assert row.spectrum.k99 <= ranks[row.name]
