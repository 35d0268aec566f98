"""The page is one file, says everything, and trusts nothing that it shows."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

import tnlm
from tnlm.errors import CheckpointError, OptionError
from tnlm.plans.report import Report
from tnlm.studies.page.write import write_page

VOID = {"meta", "br", "path", "use", "rect", "line", "image", "stop"}


class Checked(HTMLParser):
    """Follows tags, and keeps text and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.outside, self.rows = [], [], [], 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.rows += tag == "tr"
        links = (v for k, v in attributes if k in ("src", "href", "xlink:href"))
        self.outside += [v for v in links if v and not v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def saved(compressed, tmp_path):
    model = compressed("llama", "svd", keep_targets=0.5)
    tnlm.save(model, tmp_path / "model")
    return tmp_path / "model", tnlm.report(model)


def test_the_page_is_whole_and_says_everything(saved):
    directory, report = saved
    path = tnlm.write_page(directory)
    assert path == directory / "report.html"
    text = path.read_text()
    page = Checked(text)
    assert not page.outside
    assert "http" not in text.replace("http://www.w3.org", "")  # names of SVG's own dialect
    shown = "\n".join(page.words)
    for layer in report.plan.layers:
        assert layer.name in shown
    assert "keep_targets=0.5" in shown
    assert f"{report.parameters_after:,}" in shown
    assert page.rows > len(report.plan.layers)
    assert text.count("<figure>") == 3
    assert "currentColor" in text
    assert "#010203" not in text
    assert write_page(directory).read_text() == text  # the same page again


def test_what_it_shows_is_escaped(saved, tmp_path):
    directory, _ = saved
    data = json.loads((directory / "tnlm_report.json").read_text())
    data["request"]["note"] = "<script>alert(1)</script>"
    data["skipped"] = {"<img src=x>": "</td><b>"}
    (directory / "tnlm_report.json").write_text(json.dumps(data))
    page = Checked(write_page(directory, tmp_path / "page.html").read_text())
    assert "<script>alert(1)</script>" in "".join(page.words)
    assert not page.outside


def test_a_report_goes_through_json(saved):
    _, report = saved
    again = Report.from_json(report.to_json())
    assert again.to_dict() == {
        **report.to_dict(),
        "seconds": pytest.approx(report.to_dict()["seconds"], abs=0.01),
    }
    with pytest.raises(OptionError, match="not a tnlm report"):
        Report.from_json("{}")
    with pytest.raises(OptionError, match="not a tnlm"):
        Report.from_json("[")


def test_what_is_refused_leaves_no_file(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(CheckpointError, match="no readable config"):
        write_page(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_page(directory, tmp_path / "no" / "page.html")
    with pytest.raises(CheckpointError, match="cannot be read"):
        write_page(directory, evaluation=tmp_path / "no.json")
    (directory / "tnlm_report.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tnlm_report\.json"):
        write_page(directory)
    assert not list(directory.glob("*.html"))
