"""Every example runs on its tiny model, and what it shows is so."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from transformers.utils import logging

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")
NUMBER = r"([\d.]+(?:e[-+]\d+)?)"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*(LeafSpec|children_specs):FutureWarning",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, registries) -> Iterator[Callable[..., str]]:
    """Run an example as a script in an empty folder, and return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def execute(name: str, *arguments: object) -> str:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    yield execute
    plt.close("all")
    logging.enable_progress_bar()


def values(printed: str, word: str = "perplexity") -> dict[str, float]:
    """Return the numbers that follow a word, by what stands before it on the line."""
    found = re.findall(rf"^(.*?) *{word} {NUMBER}", printed, flags=re.M)
    return {" ".join(label.split()): float(number) for label, number in found}


CHECKS: dict[str, Callable[[str], None]] = {}
"""By example: asserts about what it printed."""


def check(examine: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS[examine.__name__] = examine
    return examine


@check
def first_compression(printed: str) -> None:
    found = values(printed)
    assert found["dense"] < found["compressed"] == found["loaded"] < 1.5 * found["dense"]
    assert "model.layers.1.mlp.down_proj" in printed
    assert "The value of" in printed


@check
def kronecker_terms(printed: str) -> None:
    found = values(printed)
    assert found["dense"] < found["keep 0.7, data"] < found["keep 0.7, no data"]
    assert "'terms': 4" in printed
    best, worst = (float(x) for x in re.findall(r"([\d.]+) with", printed)[-2:])
    assert best < worst


@check
def data_aware(printed: str) -> None:
    found = values(printed)
    smallest = {name: found[f"{name} keep_targets=0.4"] for name in ("svd", "svd-llm", "kfac-svd")}
    assert max(smallest, key=smallest.__getitem__) == "svd"
    assert found["svd, metric=input keep_targets=0.4"] == smallest["svd-llm"]


@check
def budget_and_front(printed: str) -> None:
    keep = re.search(rf"^keep=0.8 +keeps {NUMBER}", printed, flags=re.M)
    assert keep is not None
    assert 0.78 < float(keep.group(1)) <= 0.8
    assert re.search(r"not beaten: \[\d+, ", printed)
    assert re.search(r"^\d+ configurations$", printed, flags=re.M)
    if importlib.util.find_spec("optuna"):
        assert "configurations are on the front" in printed


@check
def embeddings(printed: str) -> None:
    errors = re.findall(rf"^(\w+) .* keeps {NUMBER}, error {NUMBER}", printed, flags=re.M)
    by_scheme = {(name, round(float(keep), 1)): float(error) for name, keep, error in errors}
    assert by_scheme["albert", 0.5] < by_scheme["tensorgpt", 0.5]
    assert all(float(keep) <= 0.75 for _, keep, _ in errors)
    assert "changing the cores of row 3 changes rows [3]" in printed


@check
def analyze_model(printed: str) -> None:
    assert "features k90" in printed
    errors = dict(re.findall(rf"low-rank +(\w+) +keep [\d.]+ error {NUMBER}", printed))
    assert float(errors["input"]) < float(errors["identity"])
    assert "suffers most: model.layers." in printed
    assert "rank correlation of error and loss" in printed


@check
def rank_search(printed: str) -> None:
    assert "perplexity on search:" in printed
    share = re.search(rf"with a budget: {NUMBER} of the parameters", printed)
    assert share is not None
    assert float(share.group(1)) <= 0.8
    assert "least: model.layers." in printed


@check
def lora_weighted_svd(printed: str) -> None:
    found = values(printed)
    assert found["healed on the factors"] < found["lora-svd"]
    assert found["compensated"] < found["lora-svd"]
    sizes = dict(re.findall(r"^([\w-]+) +(\d+) parameters", printed, flags=re.M))
    assert sizes["healed"] == sizes["lora-svd"] < sizes["compensated"]


@check
def kngpt2(printed: str) -> None:
    found = values(printed)
    assert found["teacher"] < found["distilled"] < found["compressed"]
    assert len(set(re.findall(r"teacher +perplexity (.*)", printed))) == 1


@check
def compressed_classifier(printed: str) -> None:
    found = values(printed, "accuracy")
    assert found["dense"] > 0.9
    assert found["fwsvd, trained again"] > max(found["svd"], found["fwsvd"])


@check
def own_format(printed: str) -> None:
    found = values(printed)
    assert found["dense"] < found["input"] < found["identity"]
    assert found["loaded"] == found["two-sided"]
    assert found["dense again"] == pytest.approx(found["two-sided"], abs=0.02)
    assert "heads=2 rank=" in printed


@check
def reload_and_export(printed: str) -> None:
    found = values(printed, "logits differ by")
    assert found["loaded:"] == 0
    assert found["dense:"] < 1e-4
    assert "model.pt2" in printed
    assert found.get("onnx:", 0.0) < 1e-4


@check
def shapeshifter(printed: str) -> None:
    before, after, loaded = (
        values(printed, word)["loss"] for word in ("before", "after", "loaded")
    )
    assert loaded == after < 0.6 * before


@pytest.mark.parametrize("name", NAMES)
def test_every_example_shows_what_it_says(name, run):
    printed = run(name)
    assert name in CHECKS, f"add what examples/{name}.py shows to this file"
    CHECKS[name](printed)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_a_page_of_the_gallery(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    title, line = text.splitlines()[:2]
    assert len(line) == len(title.split('"""')[1])
    assert set(line) == {"="}
    assert f"python examples/{name}.py" in text
    assert "\n# %%\n# " in text


def test_an_example_on_a_model_of_ones_own(tmp_path, run, tiny_llama, word_tokenizer, word_text):
    tiny_llama(seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(word_text(1200, seed=2))
    given = ["--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--window", 32]
    printed = run("data_aware", *given, "--figure", tmp_path / "front.png")
    assert len(values(printed)) == 11
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_a_classifier_of_ones_own(tmp_path, run, tiny_llama, word_tokenizer):
    tiny_llama(pad_token_id=0).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    row = '{{"text": "word{} word1", "label": {}}}\n'
    (tmp_path / "rows.jsonl").write_text("".join(row.format(n, n % 3) for n in range(48)))
    printed = run(
        "compressed_classifier", "--model", tmp_path / "model", "--text", tmp_path / "rows.jsonl"
    )
    assert len(values(printed, "accuracy")) == 4


def test_a_model_needs_a_text(run, capsys):
    with pytest.raises(SystemExit):
        run("data_aware", "--model", "somewhere")
    assert "--model and --text go together" in capsys.readouterr().err
