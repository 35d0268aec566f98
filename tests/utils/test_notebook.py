"""What a notebook shows of a result."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

import tnlm
from tnlm.evaluation.results import Evaluation, Figure, TaskResult
from tnlm.utils.notebook import OPEN, fragment

IDS = torch.arange(64) % 30 + 3


class Tags(HTMLParser):
    """Check that every tag is closed, and count the rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows = [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, _):
        self.rows += tag == "tr"
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def results(compressed, tiny_llama):
    """Return one of every result, with the rows of its table below the headings."""
    model = compressed("llama", "svd", keep_targets=0.5)
    report = tnlm.report(model)
    count = len(report.plan.layers)
    found = tnlm.analyze(tiny_llama(), targets=["up_proj"], progress=False)
    figure = Figure("acc", 0.5, 0.1)
    evaluation = Evaluation((TaskResult("a<b", 26, 0, 0, (figure,), "acc", (), ""),), "x", 1)
    used = tnlm.efficiency(tiny_llama(), prompt_tokens=[4], new_tokens=1, repeats=1, progress=False)
    return [
        (report.plan, count),
        (report, count),
        (found, len(found.weights)),
        (evaluation, 1),
        (used, None),
    ]


def test_every_result_has_a_short_repr_and_html_with_all_its_rows(compressed, tiny_llama):
    for found, rows in results(compressed, tiny_llama):
        short = repr(found)
        assert short.startswith(f"<{type(found).__name__}")
        assert "\n" not in short
        assert len(short) < 160
        shown = Tags(found._repr_html_())
        assert shown.rows > 1 if rows is None else shown.rows == rows + 1


def test_text_is_escaped():
    assert "<b>" not in fragment("<b>", ["<b>"], [["<b>"], ["<b>"]])


@pytest.mark.parametrize(("count", "unfolded"), [(OPEN, True), (OPEN + 1, False)])
def test_long_tables_are_folded(count, unfolded):
    assert ("<details open>" in fragment("", [], [["a"]] * (count + 1))) == unfolded
