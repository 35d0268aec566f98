"""The table of families: a sample of it is run, and the committed one is whole and honest."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = {
    "llama": "auto",
    "gpt2": "kron",
    "openai-gpt": "svd-llm",
    "mamba": "tt",
    "mixtral": "svd",
    "bert": "auto",
    "xlm": "svd-llm",
    "t5": "auto",
    "vit": "svd-llm",
    "wav2vec2": "kron",
    "llava": "svd-llm",
}
"""A few families of every modality, each under one scheme."""
LEFT = {"dbrx", "jetmoe", "llama4", "longcat_flash"}
"""Mixtures whose experts are laid out otherwise than those that can be unfolded."""


@pytest.fixture(scope="module")
def part():
    """Import a module of the benchmark, which finds its siblings as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def found():
    """The committed figures."""
    return json.loads((ROOT / "docs" / "benchmarks" / "families.json").read_text())


@pytest.mark.filterwarnings("ignore")  # of the families' own code
@pytest.mark.parametrize(("family", "scheme"), SAMPLE.items(), ids=SAMPLE)
def test_a_family_passes_every_check(family, scheme, part, caplog):
    caplog.set_level(logging.ERROR)
    row = part("family_checks").check(family, scheme)
    assert row.passes, row.checks
    assert row.share is not None


def test_a_check_that_fails_is_noted_with_its_text(part):
    row = part("family_checks").check("resnet", "svd")
    assert not row.passes
    assert row.says_why
    assert row.checks["compresses"].startswith("TnlmError: TargetError: no matrix matches")


def test_a_process_that_dies_is_noted(part, monkeypatch):
    families = part("families")
    monkeypatch.setattr(families, "check", lambda family, scheme: 1 / 0)
    assert families.guarded("llama", "svd").checks == {
        "runs": "ZeroDivisionError: division by zero"
    }
    monkeypatch.setattr(families, "check", lambda family, scheme: exit(3))
    assert families.guarded("llama", "svd").checks == {"runs": "the process ended with 3"}


def test_a_run_goes_on_where_it_stopped(part, monkeypatch, tmp_path):
    families, row = part("families"), part("family_checks").Row
    done = []

    def guarded(family, scheme):
        done.append((family, scheme))
        return row(family, "LlamaForCausalLM", scheme, params=9, checks={"compresses": True})

    monkeypatch.setattr(families, "guarded", guarded)
    words = f"x llama --schemes svd tt --lines {tmp_path}/lines.jsonl --out {tmp_path}".split()
    for _ in range(2):
        monkeypatch.setattr("sys.argv", words)
        families.main()
    assert done == [("llama", "svd"), ("llama", "tt")]
    assert "| `llama` | LlamaForCausalLM |" in (tmp_path / "families.md").read_text()


def test_the_page_is_that_of_the_figures(found, part):
    page = (ROOT / "docs" / "benchmarks" / "families.md").read_text()
    assert part("family_table").as_text(found) == page


def test_the_committed_table_reaches_the_goal(found):
    assert found["families"] >= 80
    assert found["passing"] / found["families"] >= 78 / 83
    assert found["without_reason"] == []


def test_most_of_every_mixture_is_a_target(found):
    mixtures = {each["family"]: each["targets"] for each in found["rows"] if each["mixture"]}
    assert len(mixtures) >= 20
    assert {family for family, share in mixtures.items() if share < 0.9} <= LEFT
