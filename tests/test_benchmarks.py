"""The speed benchmarks run on tiny cases; what they measure is not looked at."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import tnlm
from tnlm.decompositions import get_format
from tnlm.errors import BudgetError, TargetError
from tnlm.metrics.metric import InputMoment
from tnlm.metrics.sides import Side
from tnlm.tensors.gauge import fix

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch, tmp_path):
    """Find sibling modules as a script does, and keep this machine's measurements apart."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TNLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(monkeypatch, tmp_path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run a benchmark with options; return its figures and its Markdown text."""

    def run_it(name: str, *options: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / "out"
        words = [name, *options, "--repeats", 1, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        figures = json.loads((out / f"{name}.json").read_text())
        return figures, (out / f"{name}.md").read_text()

    return run_it


def test_layers_measures_every_format_beside_dense(run):
    options = "--shapes 24x36 --keep-targets 0.5 --tokens 1 3 --dtypes float32 bfloat16"
    figures, text = run("layers", *options.split())
    rows = figures["layers"]
    ours = [row for row in rows if row["by"] == "tnlm"]
    assert len(ours) == 6 * 2 * 2  # formats, tokens, dtypes
    assert len([row for row in rows if row["by"] == "dense"]) == len(ours)
    for row in ours:
        assert row["speed"] > 0
        assert 0 < row["macs"] <= 1
        assert row["keep"] is None or row["macs"] <= row["keep"]
    assert {row["by"] for row in rows} >= {"PEFT LoKr", "linear_operator", "tltorch, rebuilt"}
    assert "### 24x36, bfloat16" in text
    saved = figures["saved_for_backward"]
    assert 0 < saved["tnlm"] < saved["one einsum"]


def test_overhead_is_measured_in_cache_and_from_memory(run):
    figures, text = run("overhead", "--shapes", "24x16", "--keep-targets", 0.5, "--bytes", 9000)
    cases = [(row["dtype"], row["from"]) for row in figures["rows"]]
    assert cases == [(d, f) for d in ("float32", "bfloat16") for f in ("cache", "memory")]
    assert all(row["ratio"] > 0 for row in figures["rows"])
    assert "| float32 | 24x16 | 0.5 | cache |" in text


def test_predicted_compares_every_variant_with_dense(run):
    options = "--widths 192 --layers 1 --keep-targets 0.6 --prefill 8 --dtypes float32"
    figures, text = run("predicted", *options.split())
    rows = figures["rows"]
    assert len(rows) == 2 * 4  # passes, variants
    dense, low_rank, *_ = (row for row in rows if row["pass"] == "decode")
    assert dense["off"] == 0
    gained = dense["layers"] - low_rank["layers"]
    assert low_rank["predicted"] == pytest.approx(dense["measured"] - gained)
    assert "| 192, 1 blocks | float32 | prefill 8 | Kronecker sum, 0.6 |" in text


def test_serving_times_first_and_later_tokens(run, tmp_path, tiny_llama):
    tiny_llama(vocab_size=512).save_pretrained(tmp_path / "dense")
    given = f"dense={tmp_path / 'dense'}", f"same={tmp_path / 'dense'}"
    options = "--batches 1 2 --prompts 4 --new-tokens 3 --dtypes float32"
    figures, text = run("serving", *given, *options.split())
    rows = figures["rows"]
    assert [(row["batch"], row["variant"]) for row in rows] == [
        (batch, name) for batch in ("1", "2") for name in ("dense", "same")
    ]
    for row in rows:
        assert row["first_seconds"] > 0
        assert row["between_seconds"] > 0
        assert row["cache_bytes"] == int(row["batch"]) * rows[0]["cache_bytes"]
    assert rows[0]["first_speed"] == 1
    assert "| dense | float32 | eager | 2 | 4 | same |" in text


@pytest.mark.parametrize("missing", ["tltorch", "peft", "linear_operator"])
def test_a_library_that_is_missing_is_said_to_be(run, monkeypatch, missing):
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    options = "--shapes 8x8 --formats tucker kronecker-term --keep-targets 0.8 --tokens 1"
    _, text = run("layers", *options.split(), "--dtypes", "float32")
    label = "PEFT LoKr" if missing == "peft" else missing
    lines = [line for line in text.splitlines() if label in line]
    assert lines
    assert all("not installed" in line for line in lines)


def test_fit_measures_every_format_beside_its_rivals(run):
    figures, text = run("fit", "--shapes", "24x36")
    rows = figures["fits"]
    assert {row["format"] for row in rows} == {"low-rank", "kronecker", "tensor-train", "tucker"}
    for name in ("low-rank", "kronecker", "tensor-train", "tucker"):
        ours, *others = [row for row in rows if row["format"] == name and "error" not in row]
        assert ours["by"] == "tnlm"
        assert others
        for row in others:
            assert row["ours_is_faster"] > 0
            assert ours["relative_error"] <= row["relative_error"] * 1.001
    assert "| 24x36 | kronecker | tensorly |" in text


def test_model_measures_a_real_and_a_random_model(run, tmp_path, tiny_llama):
    tiny_llama(seed=0).save_pretrained(tmp_path / "tiny")
    sizes = "--hidden 32 --intermediate 48 --layers 1 --prompt-tokens 8 --new-tokens 2"
    options = [*sizes.split(), "--keep-targets", 0.6, "--dtypes", "float32", "bfloat16"]
    figures, text = run("model", tmp_path / "tiny", *options)
    rows = figures["models"]
    assert len(rows) == 2 * 2 * 2  # models, dtypes, variants
    for row in rows:
        assert row["prefill_speed"] > 0
        assert row["decode_speed"] > 0
        assert (row["share_of_bytes"] < 1) == (row["variant"] != "dense")
    full, half = (row["weight_bytes"] for row in rows[:3:2])
    assert full == 2 * half
    assert "| tiny | bfloat16 |" in text


def test_model_adds_its_rows_to_those_of_other_machines(run, tmp_path, tiny_llama):
    tiny_llama(seed=0).save_pretrained(tmp_path / "tiny")
    small = tnlm.compress(tiny_llama(seed=0), "svd", keep_targets=0.4, progress=False)
    tnlm.save(small, tmp_path / "small")
    options = ["--models", "real", "--prompt-tokens", 8, "--new-tokens", 2, "--dtypes", "float32"]
    options += ["--keep-targets", 0.6, "--compressed", f"smaller={tmp_path / 'small'}"]
    (tmp_path / "out").mkdir()
    case = {"model": "tiny", "dtype": "float32", "variant": "dense", "decode_speed": 1.0}
    far = {"processor": "far", "threads": 1, "torch": "9"}
    sizes = {"weight_bytes": 8, "share_of_bytes": 1.0, "prefill_speed": 1.0}
    sizes |= dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), 1.0)
    (tmp_path / "out" / "model.json").write_text(
        json.dumps({"machine": far, "models": [case | sizes]})
    )
    for _ in range(2):  # the second run replaces the rows of the first
        figures, text = run("model", tmp_path / "tiny", *options)
        rows = figures["models"]
        found = [(row["machine"].startswith("far,"), row["variant"]) for row in rows]
        new = [(False, name) for name in ("dense", "low rank, 0.6 kept", "smaller")]
        assert found == [(True, "dense"), *new]
    assert "| far, 1 thread, torch 9 | tiny | float32 | dense | 0 | 1.000 |" in text


@pytest.mark.parametrize(
    "name",
    [
        "timing",
        "random_layers",
        "other_libraries",
        "layers",
        "fit",
        "mixture",
        "encoder_channels",
        "mixture_methods",
        "quality",
        "bits",
        "off_grid",
        "decaying",
        "drafting",
    ],
)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_random_factors_are_what_a_fit_would_store(gaussian):
    random_layers = importlib.import_module("random_layers")
    for name in ("low-rank", "kronecker"):
        spec = random_layers.spec_within(name, (24, 16), 0.6)
        network = get_format(name).network((24, 16), spec)
        full = {factor: gaussian(*network.shape_of(factor)) for factor in network.factors}
        fitted, drawn = fix(network, full), random_layers.random_factors(network)
        assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in fitted.items()}
        order = drawn[f"{network.gauge.factor}_order"]
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(network.gauge_rows))


def test_turns_alternate_and_go_through_all_calls():
    timing = importlib.import_module("timing")
    made: list[str] = []
    calls = {
        "a": [lambda k=k: made.append(f"a{k}") for k in range(3)],
        "b": [lambda: made.append("b")],
    }
    times = timing.take_turns(calls, repeats=2)
    assert {name: len(spent) for name, spent in times.items()} == {"a": 2, "b": 2}
    assert made == ["a0", "a2", "b", "b", *["a0", "a1", "a2", "b"] * 2]


def test_saved_bytes_counts_activations_once_and_no_weights():
    layers = importlib.import_module("layers")
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    saved = layers.saved_bytes(lambda: layer(x) + layer(x), list(layer.parameters()))
    assert saved == 4 * x.numel()


@pytest.fixture
def start(monkeypatch) -> Callable[..., None]:
    """Run a benchmark with these words on its command line."""

    def start_it(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    return start_it


@pytest.fixture
def classifier(tiny_bert, word_tokenizer, tmp_path):
    """Save a classifier of two classes, with its tokenizer."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert(num_labels=2).config)
    for saved in (model, word_tokenizer):
        saved.save_pretrained(tmp_path / "m")
    return model


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.usefixtures("classifier")
def test_classification_measures_before_and_after_and_resumes(start, tmp_path, capsys):
    rows = [{"text": f"word{i} word{i % 7}", "label": i % 2} for i in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = [
        tmp_path / "m",
        file,
        file,
        tmp_path / "out",
        "--scheme",
        "svd",
        "fwsvd",
        "lpaf",
        "magnitude-svd",
    ]
    options = ["--seeds", 1, "--tokens", 60, "--samples", 4, "--max-length", 8, "--share", 0.3]
    start("classification", *words, *options)
    found = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert [row["scheme"] for row in found] == ["dense", "svd", "fwsvd", "lpaf", "magnitude-svd"]
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    assert all(0 <= row["finetuned"] <= 1 for row in found[1:])
    capsys.readouterr()
    start("classification", *words, *options)
    assert json.loads((tmp_path / "out" / "classification.json").read_text()) == found
    assert "seed" not in capsys.readouterr().err  # nothing was measured again


def first(model: Any) -> torch.Tensor:
    return model.bert.encoder.layer[0].output.dense.weight


def test_a_classifier_is_made_of_an_encoder(start, classifier, tmp_path, capsys):
    rows = [{"sentence": f"word{i} word{i % 7}", "label": i % 2} for i in range(70)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = (tmp_path / "m", file, file, tmp_path / "made", "--text", "sentence")
    start("classifier", *words)
    printed = capsys.readouterr().out
    assert 0 <= float(re.search(r"accuracy ([\d.]+) %", printed).group(1)) <= 100
    made = BertForSequenceClassification.from_pretrained(tmp_path / "made")
    assert not torch.equal(made.classifier.weight, classifier.classifier.weight)
    assert not torch.equal(first(made), first(classifier))
    start("classifier", *words, "--freeze", "embeddings", "encoder", "--rate", 1e-3, "--epochs", 1)
    made = BertForSequenceClassification.from_pretrained(tmp_path / "made")
    assert not torch.equal(made.classifier.weight, classifier.classifier.weight)
    assert torch.equal(first(made), first(classifier))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_healing_trains_what_auto_made(start, tiny_llama, word_tokenizer, word_text, tmp_path):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(1200, seed=1))
    start(
        *("healing", tmp_path / "m", tmp_path / "out", "--calibration", text, "--training", text),
        *("--text", f"own={text}", "--keep-targets", 0.6, "--how", "lora", "distill", "finetune"),
        *("--tokens", 256, "--max-length", 64, "--windows", 1),
    )
    found = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert [row["how"] for row in found] == ["dense", "none", "lora", "distill", "finetune"]
    assert all(row["own"] > 1 for row in found)
    table = (tmp_path / "out" / "healing.md").read_text()
    assert "| 0.6 | lora | 256 |" in table
    assert "%" in table
    assert tnlm.report(tmp_path / "out" / "distill-0.6").plan.scheme == "auto"


def test_texts_mixes_wikitext_with_documents_that_are_not_measured_on(start, tmp_path):
    (tmp_path / "wiki.txt").write_text("a wiki page " * 1000)
    documents = [json.dumps({"text": f"document {i} " * 200}) for i in range(12)]
    (tmp_path / "c4.jsonl").write_text("\n".join(documents))
    given = ("--wiki", tmp_path / "wiki.txt", "--c4", tmp_path / "c4.jsonl")
    start("texts", tmp_path / "out", *given, "--skip", 9)
    lines = (tmp_path / "out" / "mixture.jsonl").read_text().splitlines()
    mixed = [json.loads(line)["text"] for line in lines]
    assert [text[:11] for text in mixed if text.startswith("document")] == [
        "document 9 ",
        "document 10",
        "document 11",
    ]
    wiki = sum(len(text) for text in mixed if "wiki" in text)
    assert 0.8 < wiki / sum(len(text) for text in mixed if "wiki" not in text) < 1.4
    assert "Assert statements" in (tmp_path / "out" / "prose.txt").read_text()


def test_the_picture_draws_the_table(start, tmp_path):
    rows = [
        {"scheme": "dense", "parameters": 10**6, "wiki": 5.0},
        {"scheme": "svd", "parameters": 8 * 10**5, "wiki": 9.0},
        {"scheme": "svd", "parameters": 5 * 10**5, "wiki": 900.0},
        {"scheme": "kron", "error": "RankError"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start("picture", tmp_path / "rows.json", tmp_path / "new" / "picture.svg")
    assert "<svg" in (tmp_path / "new" / "picture.svg").read_text()


def test_groups_compares_both_weightings(start, tiny_llama, word_tokenizer, word_text, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(600, seed=1))
    sources = ("--text", text, "--calibration", text, "--window", 32, "--windows", 2)
    start("groups", tmp_path / "m", *sources, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "groups.json").read_text())["weightings"]
    assert list(found) == ["svd", "fwsvd"]
    assert all(len(each["rows"]) == 10 for each in found.values())
    table = (tmp_path / "out" / "groups.md").read_text()
    assert "| 10 |" in table
    assert "Rank correlation of error and loss over the groups: svd " in table


def test_intrinsic_measures_every_kind_and_resumes(start, classifier, tmp_path):
    rows = [{"text": f"word{i % 2} word{i}", "label": i % 2} for i in range(32)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sizes = "--dims 50 400 --steps 12 --learning-rate 3e-2 --batch-size 8 --max-length 8"
    sizes += " --freeze word_embeddings"
    words = ("intrinsic", tmp_path / "m", file, file, tmp_path / "out", *sizes.split())
    start(*words)
    found = json.loads((tmp_path / "out" / "intrinsic.json").read_text())["kinds"]
    assert list(found) == ["did", "said"]
    assert all(len(each["runs"]) == 6 for each in found.values())
    assert all(each["dimension"] in (50, 400) for each in found.values())
    whole = classifier.num_parameters()
    assert all(each["parameters"] < whole for each in found.values())
    table = (tmp_path / "out" / "intrinsic.md").read_text()
    assert "| did |" in table
    journal = tmp_path / "out" / "said" / "intrinsic.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-2]) + "\n")  # as if the run had been killed
    start(*words)
    assert journal.read_text().splitlines() == lines


@pytest.mark.usefixtures("classifier")
def test_intrinsic_keeps_the_scores_where_no_size_is_enough(start, tmp_path, monkeypatch):
    monkeypatch.setattr("tnlm.studies.analysis.goals.Goal.met", lambda goal, score: False)
    rows = [{"text": f"word{i % 2} word{i}", "label": i % 2} for i in range(32)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sizes = "--dims 1 2 --steps 4 --learning-rate 1e-2 --batch-size 8 --max-length 8 --kinds did"
    start("intrinsic", tmp_path / "m", file, file, tmp_path / "out", *sizes.split())
    found = json.loads((tmp_path / "out" / "intrinsic.json").read_text())["kinds"]["did"]
    assert found["dimension"] is None
    assert len(found["runs"]) == 6
    assert "| > 2 | 3 to > 2 |" in (tmp_path / "out" / "intrinsic.md").read_text()


@pytest.fixture
def python_pieces(monkeypatch):
    """Let models learn from a few lines, in small windows."""
    model, text = importlib.import_module("python_models"), importlib.import_module("python_text")
    lines = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    monkeypatch.setattr(model, "python_text", lambda: text.PythonText(lines, lines[:9]))
    monkeypatch.setattr(model, "WINDOW", 16)
    monkeypatch.setattr(model, "BATCH", 2)
    monkeypatch.setattr(model, "SAVED", 2)
    return model


def test_the_mixture_is_trained_once_and_measured(start, python_pieces, monkeypatch, tmp_path):
    start("mixture", "--steps", 2, "--windows", 4, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert found["parameters"] > found["expert_parameters"] > 0
    assert found["perplexity"] > 1
    assert len(found["routing"]) == 4
    for row in found["routing"]:
        assert 0 <= row["least"] <= 1 / 8 <= row["largest"] <= 1
        assert 1 <= row["effective"] <= 8.001
    assert "held-out perplexity" in (tmp_path / "out" / "mixture.md").read_text()
    monkeypatch.setattr(python_pieces, "train", None)  # it is not called again
    start("mixture", "--steps", 2, "--windows", 4, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mixture.json").read_text()) == found


@pytest.mark.usefixtures("python_pieces")
def test_training_the_mixture_goes_on_where_it_stopped(monkeypatch, tmp_path):
    losses, mixture = {}, importlib.import_module("mixture_model")
    for name, stops in (("whole", ()), ("stopped", (4,))):
        monkeypatch.setenv("TNLM_HOME", str(tmp_path / name))
        real, calls = torch.nn.utils.clip_grad_norm_, []

        def clip(*given, real=real, calls=calls, stops=stops):
            calls.append(given)
            if len(calls) in stops:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
            mixture.trained_mixture(5)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", real)
        _, _, folder = mixture.trained_mixture(5)
        losses[name] = json.loads((folder / "training_loss.json").read_text())
        assert not (folder / "partial.pt").exists()
    assert losses["stopped"] == losses["whole"]


def test_a_second_model_is_trained_and_measured_by_draws(
    start, python_pieces, monkeypatch, tmp_path
):
    options = ["second_model", "--steps", 2, "--windows", 2, "--num-samples", 4]
    options += ["--scheme", "svd-llm", "svd", "--keep-targets", 0.6, "--seeds", 0, 1]
    options += ["--gradient-samples", 2, "--out", tmp_path / "out"]
    start(*options)
    found = json.loads((tmp_path / "out" / "second_model.json").read_text())
    assert [row["scheme"] for row in found["rows"]] == [
        "dense",
        *("svd-llm:seed=0", "svd-llm:seed=1", "svd"),
    ]
    assert found["unigram"] > 1
    assert found["trained_tokens"] == 2 * 2 * 16
    assert all(row["held-out text"] > 1 for row in found["rows"])
    text = (tmp_path / "out" / "second_model.md").read_text()
    assert re.search(r"\| `svd-llm` \| 0.6 \| [\d.]+ ± [\d.]+ \(", text)
    monkeypatch.setattr(python_pieces, "train", None)  # it is not called again
    monkeypatch.setattr("tnlm.compress", None)  # neither is this
    start(*options)
    assert json.loads((tmp_path / "out" / "second_model.json").read_text()) == found
    options[options.index("svd-llm") : options.index("--keep-targets")] = ["svd"]
    start(*options)  # of what is measured already, the part that is asked for
    fewer = json.loads((tmp_path / "out" / "second_model.json").read_text())
    assert fewer["rows"] == [found["rows"][0], found["rows"][-1]]


def test_models_of_other_configurations_or_training_have_other_folders(python_pieces, monkeypatch):
    second, folders = importlib.import_module("second_model"), []
    monkeypatch.setattr(second, "WINDOW", 16)

    def trained(**changes):
        def make():
            model = second.make_model()
            model.config.update(changes)
            return model

        folders.append(python_pieces.trained("gpt2", make, 1)[2])

    trained()
    trained()
    trained(layer_norm_epsilon=1e-6)
    monkeypatch.setattr(python_pieces, "RATE", 1e-3)
    trained()
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_experts_are_decoded_beside_the_dense_ones(tmp_path):
    module = runpy.run_path(str(BENCHMARKS / "experts.py"))
    sizes = "--hidden 16 --inner 24 --experts 4 --tokens 1 3 --rounds 2"
    rows = module["main"]([str(tmp_path), *sizes.split()])
    assert [row["tokens"] for row in rows] == [1, 3]
    assert all(row[way] > 0 for row in rows for way in ("eager", "grouped_mm", "factored"))
    assert (tmp_path / "experts.jsonl").read_text().count("\n") == 2


def test_fused_projections_make_no_difference_to_auto(
    start, tiny_llama, word_tokenizer, word_text, tmp_path, capsys
):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(1200, seed=1))
    start("fused", tmp_path / "m", text, text, "--length", 64, "--test-windows", 1)
    found = re.findall(r"(\w+): .* ratio ([\d.]+)", capsys.readouterr().out)
    (llama, plain), (phi, split) = found
    assert (llama, phi) == ("LlamaForCausalLM", "Phi3ForCausalLM")
    assert float(split) == pytest.approx(float(plain), abs=1e-3)


def test_encoders_are_measured_with_and_without_channels(start, classifier, tmp_path, capsys):
    rows = [{"text": f"word{i} word{i % 7}", "label": i % 2} for i in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    start("encoder_channels", tmp_path / "m", file, file, "--keep", 0.6, "--samples", 8)
    printed = capsys.readouterr().out
    assert "keep 0.6, with channels: " in printed
    assert "keep 0.6, without: " in printed


def test_methods_for_experts_are_compared_and_resumed(start, python_pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(python_pieces, "WINDOW", 32)
    options = ["mixture_methods", "--steps", 1, "--windows", 2, "--out", tmp_path / "out"]
    options += ["--scheme", "reap", "--keep-targets", 0.5]
    start(*options)
    rows = json.loads((tmp_path / "out" / "mixture_methods.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["dense", "reap"]
    assert rows[1]["keep_targets"] == 0.5
    assert all(len(row["losses"]) == 2 for row in rows)
    assert "| reap | 0.500 |" in (tmp_path / "out" / "mixture_methods.md").read_text()
    monkeypatch.setattr("tnlm.compress", None)  # it is not called again
    start(*options)
    assert json.loads((tmp_path / "out" / "mixture_methods.json").read_text())["rows"] == rows


def test_large_models_stay_below_their_cap(run, tmp_path):
    sizes = "--hidden 64 --blocks 3 --vocabulary 64 --memory 4GB --scheme svd-llm --length 32"
    figures, text = run("large_models", tmp_path / "large", *sizes.split())
    assert 0 < figures["peak"] < 4e9
    assert len(figures["block"]) == 3
    block = 4 * 64**2 + 3 * 64 * 176 + 2 * 64
    assert figures["size"] == 4 * (2 * 64**2 + 64 + 3 * block)
    assert "| svd-llm | 0.00 GB | 4GB |" in text


@pytest.mark.slow
def test_processes_are_timed_beside_one(tiny_llama, word_tokenizer, word_text, tmp_path):
    model, text, out = tmp_path / "m", tmp_path / "text.txt", tmp_path / "out"
    tiny_llama().save_pretrained(model)
    word_tokenizer.save_pretrained(model)
    text.write_text(word_text(200))
    script = [sys.executable, BENCHMARKS / "processes.py", model, text]
    options = ["--windows", "3", "--length", "16", "--out"]
    subprocess.run([*script, *options, out], check=True, capture_output=True)
    figures = json.loads((out / "processes.json").read_text())
    assert {count: len(runs) for count, runs in figures.items()} == {"1": 1, "2": 1}
    assert "| processor |" in (out / "processes.md").read_text()


def test_bases_of_the_stream_are_compared_and_resumed(
    start, tiny_llama, word_tokenizer, word_text, monkeypatch, capsys, tmp_path
):
    tiny_llama(tie_word_embeddings=True, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(400))
    options = ["rotated", tmp_path / "m", tmp_path / "out", "--text", f"t={tmp_path}/text.txt"]
    options += ["--calibration", tmp_path / "text.txt", "--window", 32, "--windows", 2]
    start(*options)
    rows = [json.loads(line) for line in (tmp_path / "out/rotated.jsonl").read_text().splitlines()]
    assert [row["basis"] for row in rows] == ["own", "principal", "procrustes", "low-rank"]
    assert rows[2]["errors"] == sorted(rows[2]["errors"], reverse=True)
    text = capsys.readouterr().out
    monkeypatch.setattr("tnlm.rotate", None)  # it is not called again
    start(*options)
    assert capsys.readouterr().out == text


def test_bits_and_structure_are_compared_off_the_grid_and_resumed(
    start, tiny_llama, word_tokenizer, word_text, monkeypatch, tmp_path
):
    tiny_llama(tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(
        tmp_path / "m"
    )
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(900))
    start("off_grid", tmp_path / "m", tmp_path / "rotated")
    options = ["bits", tmp_path / "rotated", tmp_path / "out", "--text", f"t={tmp_path}/text.txt"]
    options += ["--calibration", tmp_path / "text.txt", "--recipe", "dense", "rtn:precision=int4"]
    start(*options)
    text = (tmp_path / "out" / "bits.md").read_text()
    assert "| rtn:precision=int4 | 0.279 | 1.000 |" in text
    monkeypatch.setattr("tnlm.compress", None)  # it is not called again
    start(*options)
    assert (tmp_path / "out" / "bits.md").read_text() == text


@pytest.fixture
def vllm_python(tmp_path):
    """Stand in for a Python with vLLM: an echo of the same tokens, in one second."""

    def make(tokens: list[list[int]]) -> Path:
        said = json.dumps({"seconds": 1.0, "threads": 1, "tokens": tokens})
        file = tmp_path / "python"
        answer = f"print('RESULT', {said!r}, flush=True)"
        file.write_text(f"#!{sys.executable}\nimport sys\nfor _ in sys.stdin: {answer}\n")
        file.chmod(0o755)
        return file

    return make


def run_vllm_serving(monkeypatch, capsys, *words: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["vllm_serving", *map(str, words)])
    runpy.run_path(str(BENCHMARKS / "vllm_serving.py"), run_name="__main__")
    return json.loads(capsys.readouterr().out)


def test_speed_in_vllm_is_a_median_of_turns(monkeypatch, capsys, vllm_python):
    sizes = ["--width", 64, "--layers", 1, "--vocabulary", 32, "--prompts", 4, "--count", 5]
    words = ["speed", *sizes, "--turns", 3, "--python", vllm_python([[1]])]
    found = run_vllm_serving(monkeypatch, capsys, *words)
    assert found["ratios"] == [1.0] * 3
    assert found["tokens_per_second"] == [20.0, 20.0]
    assert found["parameters"][1] < found["parameters"][0]


def test_tokens_in_vllm_are_compared(
    monkeypatch, capsys, vllm_python, tmp_path, tiny_llama, word_tokenizer, word_text
):
    import tnlm

    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    tnlm.save(model, tmp_path / "small", tokenizer=word_tokenizer)
    (tmp_path / "text.txt").write_text(word_text(64))
    words = ["tokens", tmp_path / "small", "--text", tmp_path / "text.txt", "--prompts", 2]
    words += ["--prompt-tokens", 4, "--count", 3, "--python", vllm_python([[0] * 3] * 2)]
    found = run_vllm_serving(monkeypatch, capsys, *words)
    assert found["equal"] + len(found["others"]) == found["prompts"] == 2
    assert all(other["log_ratio"] >= 0 for other in found["others"])


def test_costs_of_large_models_grow_with_them(run):
    figures, text = run("cost_model", "--widths", 32, "--models", "7B", "400B mixture")
    dense, mixture = figures["rows"]
    assert dense["params"] == 6_738_149_376  # matrices and tables of Llama 2 7B, without norms
    assert 0 < dense["auto"]["peak"] < 2 * dense["params"]
    assert mixture["fit"] > dense["fit"] > 0
    assert mixture["gather"] / mixture["params"] < dense["gather"] / dense["params"]
    assert "| in memory | in memory |" in text


def test_the_short_table_of_quality_joins_draws_and_names_the_model():
    quality = importlib.import_module("quality")
    rows = [
        {"scheme": "dense", "asked": 1.0, "wiki": 10.0, "parameters": 9, "total_seconds": 0.0},
        {"scheme": "auto", "asked": 0.8, "wiki": 11.0},
        {"scheme": "dense", "asked": 1.0, "wiki": 10.0, "parameters": 9, "total_seconds": 0.0},
        {"scheme": "auto:seed=1", "asked": 0.8, "wiki": 13.0},
        {"scheme": "svd-llm:damping=0.1,seed=1", "asked": 0.8, "wiki": 15.0},
        {"scheme": "svd", "asked": 0.8, "wiki": 1e9},
        {"scheme": "tt", "asked": 0.8, "error": "ValueError"},
    ]
    first, _, _, _, *table = quality._readme(rows, "models/tiny").splitlines()
    assert first == "tiny; perplexity of the dense model: 10.0 on wiki."
    assert table == [
        "| `auto` | 0.8 | 1.200 ± 0.141 (1.100 to 1.300) |",
        "| `svd-llm:damping=0.1` | 0.8 | 1.500 |",
        "| `svd` | 0.8 | destroyed |",
    ]


def test_a_scheme_that_fails_is_a_row_and_the_others_go_on(
    tiny_llama, word_tokenizer, word_text, monkeypatch, tmp_path
):
    quality = importlib.import_module("quality")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(128))
    real = tnlm.compress

    def compress(model, scheme, **given):
        if scheme == "kron":
            raise BudgetError("nothing fits", argument="keep_targets")
        return real(model, scheme, **given)

    monkeypatch.setattr(tnlm, "compress", compress)
    words = [tmp_path / "m", tmp_path / "out", "--together", "--scheme", "kron", "svd"]
    words += ["--keep-targets", 0.6, "--window", 16, "--windows", 2]
    words += ["--calibration", tmp_path / "text.txt", "--text", f"t={tmp_path}/text.txt"]
    rows = quality.main([str(word) for word in words])
    assert [row["scheme"] for row in rows] == ["dense", "kron", "svd"]
    error = "tnlm.errors.BudgetError: nothing fits"
    assert rows[1] == {"scheme": "kron", "asked": 0.6, "error": error}
    assert rows[2]["t"] > 1


def test_the_hull_of_a_block_takes_a_structure_where_it_harms_less():
    module = importlib.import_module("tensor_hull_table")
    assert module.hull([(4, 0.0), (1, 9.0), (2, 5.0), (3, 4.0)]) == [(1, 9.0), (2, 5.0), (4, 0.0)]
    assert module.together([[(1, 9.0), (2, 5.0)], [(1, 3.0), (2, 0.0)]])[1:] == [(3, 8.0), (4, 5.0)]
    named = {"target": "layers.5.q", "members": ["layers.5.q"], "size": 10, "energy": 8.0}
    low = {**named, "structure": "low-rank", "share": 0.0, "curve": [[1, 8.0], [5, 4.0]]}
    fit = {"target": "layers.5.q", "structure": "kron", "share": 0.5, "params": 5, "harm": 3.0}
    assert module.least_harm([low, fit], None, 0.5) == 4.0
    assert module.least_harm([low, fit], "kron", 0.5) == 3.0
    assert "| kron | 0.75, 0.75 |" in list(module.tables([low, fit]))


def test_rounds_of_a_hybrid_never_raise_its_harm(gaussian, monkeypatch):
    module = importlib.import_module("tensor_hull")
    weight = gaussian(12, 8)
    harms = []
    for rounds in (1, 2, 4):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        fit = module.hybrid(weight, weighted_inputs(gaussian), 70)
        assert fit["params"] <= 70
        assert fit["macs"] <= 96
        harms.append(fit["harm"])
    assert harms == sorted(harms, reverse=True)


def weighted_inputs(gaussian):
    root = gaussian(8, 8, seed=1)
    return InputMoment(root.T @ root)


def test_linear_maps_of_sublayers_are_weighed_against_autos_choices(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(word_text(512))
    options = "--num-samples 8 --window 32 --gradient-samples 2 --keep-targets 0.8 0.5"
    out = tmp_path / "rows.json"
    start(
        "linear_sublayers",
        *(str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt")),
        *(*options.split(), "--out", str(out)),
    )
    rows = json.loads(out.read_text())
    assert [row["keep_targets"] for row in rows] == [0.8, 0.5]
    assert all(0 < row["loss_with_maps"] <= row["loss"] * 1.001 for row in rows)


def linear_sublayers(tiny_llama, word_tokenizer, word_text, folder, *options, gate=None, **config):
    """Return the words of its command line for a tiny Llama, whose gates may be constants."""
    model = tiny_llama(num_hidden_layers=1, **config)
    if gate is not None:
        torch.nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
        torch.nn.init.constant_(model.model.layers[0].mlp.gate_proj.bias, gate)
    model.save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(word_text(512))
    words = ["linear_sublayers", folder / "model", "--calibration", folder / "text.txt"]
    words += ["--num-samples", 8, "--window", 32, "--gradient-samples", 2]
    return [*words, "--out", folder / "rows.json", "--keep-targets", *options]


def test_a_linear_sublayer_is_taken_as_a_map(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    made = (tiny_llama, word_tokenizer, word_text, tmp_path)
    start(*linear_sublayers(*made, 0.6, gate=2.0, mlp_bias=True))
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert "model.layers.0.mlp" in row["maps"]
    assert row["loss_with_maps"] < 0.9 * row["loss"]


def test_budgets_below_what_can_be_kept_are_refused_not_left_out(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    made = (tiny_llama, word_tokenizer, word_text, tmp_path)
    with pytest.raises(BudgetError):
        start(*linear_sublayers(*made, 0.8, 1e-9))


def test_linear_sublayers_refuses_models_whose_matrices_have_other_names(tiny_gpt2):
    module = importlib.import_module("linear_sublayers")
    with pytest.raises(TargetError, match=r"transformer\.h\.0\.mlp has no gate_proj"):
        module.moments_of(tiny_gpt2(), [])
    with pytest.raises(TargetError, match="no self_attn or mlp"):
        module.moments_of(nn.Linear(2, 2), [])


def test_the_moments_of_a_linear_sublayer_give_a_map_without_harm():
    module = importlib.import_module("linear_sublayers")
    gaussian = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=gaussian) + 1.0
    first, last = nn.Linear(6, 6), nn.Linear(6, 4)
    moments = module.Moments()
    handles = moments.watch(first, last)
    first(inputs)
    last(torch.cat([inputs, inputs], 1)[:, 3:9])  # a linear map of the inputs
    harms = moments.harms(Side(torch.eye(4)))
    outputs = last(torch.cat([inputs, inputs], 1)[:, 3:9])
    for handle in handles:
        handle.remove()
    spread = outputs.detach().double().var(0, correction=0).sum()
    assert float(harms[0]) == pytest.approx(float(spread), rel=1e-3)
    assert float(harms[4]) < 1e-3 * float(spread)
    assert list(harms) == sorted(harms, reverse=True)
