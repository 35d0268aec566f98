"""The command line, run as a user does, on a tiny model with a tokenizer."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

import tnlm
from tnlm.cli import main as cli
from tnlm.evaluation import Perplexity
from tnlm.utils.claim import temporary_folder


@pytest.fixture
def source(tmp_path, tiny_llama, word_tokenizer):
    folder = tmp_path / "model"
    tiny_llama(seed=0, tie_word_embeddings=True).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path, word_text):
    path = tmp_path / "text.txt"
    path.write_text(word_text(600, seed=1))
    return path


def run(*arguments):
    """Return what a command prints, as JSON."""
    result = CliRunner().invoke(
        cli.app, [str(a) for a in (*arguments, "--json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fails(*arguments):
    """Return the error of a command that the user got wrong."""
    with pytest.raises(tnlm.TnlmError) as caught:
        CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    return str(caught.value)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification, BertModel])
def test_an_encoder_keeps_its_class(kind, tiny_bert, word_tokenizer, text, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    kind(tiny_bert().config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    run("compress", folder, out, "--scheme", "svd", "--keep-targets", 0.6)
    assert type(tnlm.load(out)) is kind
    data = ("--calibration", text, "--num-samples", 2, "--max-length", 16)
    assert run("plan", folder, "--scheme", "svd-llm", *data)["layers"]
    for place in (folder, out):
        error = fails("evaluate", place, "--text", text, "--window", 16)
        assert "needs a causal language model" in error
        assert kind.__name__ in error


def test_a_model_is_compressed_from_files_to_files(source, text, tmp_path):
    out, options = tmp_path / "out", ("--scheme", "svd", "--keep-targets", 0.6)
    report = run("compress", source, out, *options, "--memory", "4GB", "--scratch", tmp_path)
    assert report["request"]["keep_targets"] == 0.6
    assert tnlm.load(out).config.model_type == "llama"
    data = ("--calibration", text, "--num-samples", 2, "--max-length", 16, "--memory", "4GB")
    run("compress", source, tmp_path / "data", "--scheme", "svd-llm", *data)
    needed = run("plan", source, "--scheme", "auto", *data[:-2], "--resources")
    assert needed["peak"] == needed["now"] + max(needed["stages"].values())
    plain = CliRunner().invoke(cli.app, ["plan", str(source), "-s", "svd", "--resources"])
    assert "peak memory: " in plain.stdout
    error = fails("compress", source, tmp_path / "other", *options, "--memory", "1MB")
    assert "give at least memory=" in error
    (tmp_path / "plan.json").write_text("{}")
    plan = ("--plan", tmp_path / "plan.json", "--memory", "4GB")
    assert "plan" in fails("compress", source, tmp_path / "other", *plan)


def test_a_budget_in_time_takes_prices_from_a_file(source, text, tmp_path):
    times = {"call": 1e-9, "step": 0.0, "loads": [1e-9] * 5, "move": 0.0, "macs": [1e-15] * 4}
    times["column_major"] = True
    name = f"far cpu {torch.get_num_threads()} threads torch.float32"
    (tmp_path / "machine.json").write_text(json.dumps({name: times}))
    asked = ("--scheme", "auto", "--keep-targets", 0.7, "--unit", "time", "--workload", "prefill:8")
    data = ("--calibration", text, "--num-samples", 2, "--max-length", 16)
    plan = run("plan", source, *asked, *data, "--prices", tmp_path / "machine.json")
    before, after = (sum(row[n]["time"] for row in plan["layers"]) for n in ("before", "after"))
    assert 0 < after <= 0.7 * before
    assert plan["request"]["prices"] == {name: times}
    error = fails("plan", source, "--scheme", "svd", "--workload", "decode")
    assert "workload= has no effect with unit='params'" in error


def test_schemes_lists_every_scheme():
    assert list(run("schemes")) == tnlm.list_schemes()


def test_compress_then_evaluate_then_info(source, text, tmp_path):
    out = tmp_path / "out"
    dense = run("evaluate", source, "--text", text, "--window", 16, "--windows", 4)
    report = run(
        *("compress", source, out, "--scheme", "svd-llm", "--keep-targets", 0.6),
        *("--calibration", text, "--num-samples", 4, "--max-length", 32),
    )
    after = run("evaluate", out, "--text", text, "--window", 16, "--windows", 4)
    info = run("info", out)
    assert dense["parameters"] == report["parameters_before"]
    assert after["parameters"] == report["parameters_after"] == info["parameters"]
    assert report["target_parameters_after"] <= 0.6 * report["target_parameters_before"]
    assert report["seconds"] > 0
    assert (after["window"], after["windows"], after["tokens"]) == (16, 4, 60)
    assert after["perplexity"] > 1
    assert (info["scheme"], info["modules"]) == ("svd-llm", {"low-rank": 14})


def test_plan_changes_nothing_and_matches_compress(source, tmp_path):
    asked = ("--scheme", "kron", "--terms", 2, "--targets", ".*up_proj")
    plan = run("plan", source, *asked)
    report = run("compress", source, tmp_path / "out", *asked)
    assert [row["spec"] for row in plan["layers"]] == [row["spec"] for row in report["layers"]]


def test_a_plan_may_train_and_fix_how_many_channels_stay(source, text):
    asked = ("--calibration", text, "--max-length", 16)
    plan = run("plan", source, "--scheme", "modegpt", "--width", 24, *asked)
    assert {row["spec"].get("width", 24) for row in plan["layers"]} == {24}
    trained = run("plan", source, "--scheme", "svd", "--recover", "lora", "--training", text)
    assert trained["request"]["recover"] == "lora"


def test_tables_are_printed_without_json(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 160)  # whatever COLUMNS was at import
    out = tmp_path / "out"
    for arguments, shown in (
        (("schemes",), "tensorgpt"),
        (("plan", source, "--scheme", "svd"), "up_proj"),
        (("compress", source, out, "--scheme", "svd", "--no-gauge"), "saved to"),
        (("info", out), "low-rank"),
    ):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0
        assert shown in result.stdout


def test_a_narrow_terminal_folds_names_and_crops_no_figures(source, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 80)
    found = run("plan", source, "--scheme", "svd")["layers"]
    shown = CliRunner().invoke(cli.app, ["plan", str(source), "--scheme", "svd"]).stdout
    assert "matrices of model.layers" in shown
    for layer in found:
        assert layer["name"].removeprefix("model.layers.") in shown
        assert f"{layer['error']:.4f}" in shown


def test_lists_of_numbers_reach_the_format(source, tmp_path):
    report = run(
        *("compress", source, tmp_path / "out", "--scheme", "tt", "--targets", ".*q_proj"),
        *("--out-split", "4,8", "--in-split", "8,4", "--ranks", "3", "--max-macs", "inf"),
    )
    assert report["layers"][0]["spec"] == {
        "out_split": [4, 8],
        "in_split": [8, 4],
        "ranks": [3],
    }


def test_a_wrong_request_is_refused_before_the_model_loads(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "did you mean 'kron'" in fails("plan", nowhere, "--scheme", "kro")
    assert "did you mean 'terms'" not in fails("plan", nowhere, "--scheme", "svd", "--terms", 4)
    assert "whole numbers" in fails("plan", nowhere, "--scheme", "tt", "--ranks", "a,b")
    assert "fraction in (0, 1]" in fails("plan", nowhere, "--scheme", "svd", "--keep", 1.5)


def test_missing_calibration_is_found_before_the_model_loads(tmp_path):
    for command in (("plan", tmp_path / "no"), ("compress", tmp_path / "no", tmp_path / "out")):
        assert "needs data; pass calibration=" in fails(*command, "--scheme", "svd-llm")


def test_what_is_loaded_is_named_on_stderr(source):
    done = CliRunner().invoke(cli.app, ["plan", str(source), "--scheme", "svd", "--json"])
    assert done.stderr.startswith(f"loading {source} ...\n")
    assert json.loads(done.stdout)


def test_an_analysis_has_a_page_beside_its_tables(source, text, tmp_path):
    run("compress", source, tmp_path / "small", "--scheme", "svd")
    data = ("--calibration", text, "--num-samples", 2, "--max-length", 16, "--baseline", source)
    run("analyze", tmp_path / "small", tmp_path / "study", *data)
    assert {"analysis.html", "weights.csv"} <= {
        path.name for path in (tmp_path / "study").iterdir()
    }


def test_a_baseline_that_no_page_would_show_is_refused_early(text, tmp_path, monkeypatch):
    asked = ("analyze", tmp_path / "no", tmp_path / "study", "--baseline", tmp_path / "nothing")
    assert "--baseline needs --calibration" in fails(*asked)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'tnlm[plot]'" in fails(*asked, "--calibration", text)


def test_a_page_is_readable_by_others(source, tmp_path):
    before = os.umask(0o022)
    try:
        run("compress", source, tmp_path / "out", "--scheme", "svd")
        page = Path(run("report", tmp_path / "out", "--html", tmp_path / "page.html")["page"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(page.stat().st_mode) == 0o644


def test_an_output_directory_with_files_is_refused(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "not empty" in fails("compress", source, out, "--scheme", "svd")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tnlm", "info", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("CheckpointError: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def shell(monkeypatch, capsys, source, text, tmp_path):
    """Run a line as the program does; return its exit status, and both outputs."""
    monkeypatch.chdir(tmp_path)

    def run_it(line):
        monkeypatch.setattr(sys, "argv", ["tnlm", *line.split()])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return run_it


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "plan model -s svd-llm",
            "'svd-llm' with --metric input needs data; pass --calibration",
        ),
        ("plan model -s svd --calibration text.txt", "Error: --calibration has no effect on"),
        ("plan model -s svd --keep 0.8 --keep-targets 0.8", "--keep and --keep-targets given"),
        ("plan model -s svd --keep 0.01", "possible is --keep 0."),
        ("plan model -s svd --keep-targets 0", "Error: --keep-targets 0.0; allowed: a fraction"),
        ("plan model -s svd --rank 99", "q_proj: --rank 99; a 32x32 matrix allows 1 to 32"),
        ("plan model -s svd --terms 4", "Allowed: --gauge, --rank"),
        ("plan model -s kro", "did you mean 'kron'"),
        ("plan model -s tt --ranks 3 --out-split 5,7", "--out-split 5,7 multiplies to 35, not to"),
        ("plan model -s svd --blocks 1", "--blocks 1 has no effect with --allocation uniform"),
        ("plan model -s svd --dtype float3", "--dtype float3; did you mean 'float32'"),
        ("plan model -s svd --ignore nothing", "Error: --ignore nothing matches no matrix"),
        ("plan model -s lpaf --calibration text.txt --max-length 601", "of at most 600 or give"),
        ("compress model model -s svd", "choose another, or pass --overwrite"),
        ("compress model out -s svd --recover-tokens 5", "has no effect without --recover;"),
        ("evaluate model --text text.txt --window 1", "Error: --window 1 predicts nothing"),
        ("info nowhere", "nowhere has no readable config.json"),
        ("efficiency model --prompt-tokens 500", "--prompt-tokens + --new-tokens = 532, but"),
        ("evaluate model", "Error: nothing to measure; pass --text or --tasks"),
        (
            "evaluate model --tasks piqa --batch-size 0",
            "Error: --batch-size 0, but at",
        ),
        ("evaluate model --text text.txt --limit 3", "Error: --limit has no effect on a text"),
        ("evaluate model --tasks winobias", "no task like winobias; give --data"),
        (
            "rank-search model out --search text.txt --report text.txt -s svd --max-length 32",
            "item 0 of --report is item 0 of --search",
        ),
        (
            "rank-search model out --search text.txt --report text.txt --keep 0.5 --chunks 3",
            "Error: --chunks has no effect with --keep",
        ),
    ],
)
@pytest.mark.parametrize("as_json", ["", " --json"])
def test_a_mistake_is_told_in_the_words_of_the_shell(shell, line, said, as_json):
    code, out, err = shell(line + as_json)
    error = err.splitlines()[-1]  # no progress bar stands before it, and no traceback
    assert (code, out) == (1, "")
    assert re.match(r"\w+Error: ", error)
    assert said in error
    assert not re.search(r"\w=", error)


@pytest.mark.parametrize(
    "line",
    [
        "plan model -s svd-llm --calibration nothing.txt",
        "compress model out -s svd --recover lora --training nothing.txt",
        "evaluate model --text nothing.txt",
        "evaluate model --tasks piqa --data nothing.txt",
        "rank-search model out --search nothing.txt --report text.txt",
        "report model --evaluation nothing.txt",
    ],
)
def test_a_file_that_is_missing_is_found_before_the_model_loads(shell, line, monkeypatch):
    monkeypatch.setattr("tnlm.checkpoint.dense_models.load_model", None)
    code, out, err = shell(line)
    assert (code, out) == (2, "")
    assert "nothing.txt" in err


def test_compress_can_train_in_the_end(source, text, tmp_path):
    report = run(
        *("compress", source, tmp_path / "out", "--scheme", "svd", "--recover", "lora"),
        *("--recover-tokens", 64, "--training", text, "--max-length", 16),
    )
    assert report["request"]["recover"] == "lora"
    assert report["seconds_by_stage"]["recover"] > 0
    assert "did you mean 'lora'" in fails(
        "compress", source, tmp_path / "no", "--scheme", "svd", "--recover", "lor"
    )


def test_analyze_writes_tables(source, text, tmp_path):
    out = tmp_path / "out"
    options = ("--calibration", text, "--max-length", 16, "--format", "low-rank")
    found = run("analyze", source, out, *options, "--targets", ".*up_proj")
    assert tnlm.Analysis.from_json((out / "analysis.json").read_text()).to_json() == json.dumps(
        found, indent=1
    )
    assert len(found["features"]) == 4 * len(found["weights"])
    assert found["protocol"]["tokens"] == 256
    assert found["curves"]
    assert (out / "weights.csv").is_file()
    assert "is not empty" in fails("analyze", "./no/such/model", out)


def test_evaluate_scores_local_rows_and_a_text_beside_a_baseline(source, text, tmp_path):
    choices = ["word1", "word2"]
    rows = [{"query": f"word{i}", "choices": choices, "gold": i % 2} for i in range(4)]
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "arc_easy_test.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("evaluate", source, "--tasks", "arc_easy", "--data", tmp_path / "data")
    options = ("--max-length", 12, "--max-new-tokens", 4, "--seed", 7)
    found = run(*arguments, *options, "--baseline", source, "--out", tmp_path / "found.json")
    (task,) = found["results"]
    assert task["n"] == 4
    assert task["figures"][0]["difference"] == 0
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert "did you mean 'arc_easy'" in fails("evaluate", "./no/model", "--tasks", "arc_eazy")
    assert "cannot be written" in fails(*arguments, "--out", tmp_path / "no" / "found.json")
    words = ("--text", text, "--window", 16, "--windows", 4)
    both = run(*arguments, *options, *words, "--out", tmp_path / "both.json")
    alone = run("evaluate", source, *words)
    assert list(alone) == [*(field.name for field in fields(Perplexity)), "parameters", "text"]
    assert {key: both[key] for key in alone} == alone
    assert [result["task"] for result in both["results"]] == ["perplexity", "arc_easy"]
    stored = tnlm.Evaluation.from_json((tmp_path / "both.json").read_text())
    assert stored.perplexity.perplexity == alone["perplexity"]
    beside = run("evaluate", source, *words, "--baseline", source)
    assert beside["results"][0]["figures"][0]["difference"] == 0
    shown = CliRunner().invoke(cli.app, ["evaluate", *map(str, (source, *words))]).stdout
    assert shown.startswith("perplexity ")
    assert shown.endswith(
        f"4 windows of 16 tokens, 60 predictions), {alone['parameters']:,} parameters\n"
    )


def test_efficiency_measures_beside_a_baseline(source):
    options = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 2)
    found = run("efficiency", source, "--baseline", source, *options)
    assert found["baseline"] is not None


def test_a_searched_model_has_a_page(source, text, tmp_path, word_text):
    other = tmp_path / "other.txt"
    other.write_text(word_text(300, seed=2))
    out = tmp_path / "out"
    found = run(
        *("rank-search", source, out, "--search", text, "--report", other, "--scheme", "svd"),
        *("--growth", 1.5, "--max-length", 32),
    )
    assert found["trials"]
    again = tmp_path / "again"
    thirds = run(
        *("rank-search", source, again, "--search", text, "--report", other, "--scheme", "svd"),
        *("--growth", 1.5, "--max-length", 32, "--chunks", 3, "--candidates", "0.5,0.9"),
        *("--order", "forward", "--output-dir", tmp_path / "trials"),
    )
    assert thirds["trials"][0]["layer"] != found["trials"][0]["layer"]  # the first, not the last
    assert {trial["chunk"] for trial in thirds["trials"]} >= {1, 2, 3}
    assert all(
        len({t["rank"] for t in thirds["trials"] if t["layer"] == at["layer"]}) <= 2
        for at in thirds["trials"]
    )
    assert (tmp_path / "trials" / "search.jsonl").is_file()
    for option, name in (("--html", "page.html"), ("--out", "same.html")):
        page = run("report", out, option, tmp_path / name)["page"]
        assert "<!doctype html>" in (tmp_path / name).read_text()
        assert page == str(tmp_path / name)
    assert run("report", out) == json.loads(tnlm.report(out).to_json())
    shown = CliRunner().invoke(cli.app, ["report", str(out)]).stdout
    assert "params" in shown
    assert not list(out.glob("*.html"))


def test_a_terminated_command_ends_as_after_ctrl_c(monkeypatch, tmp_path):
    def command():
        with temporary_folder() as folder:
            (folder / "file").touch()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "app", command)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_outputs_and_caches_that_cannot_be_are_refused_before_the_model_loads(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to("nowhere")
    text = ["--calibration", str(file)]
    for out, more, told in (
        (link, [], "is a link to nowhere"),
        (file, [], "is a file"),
        (file / "below", [], "is a file"),
        (tmp_path / "out", ["--cache-dir", str(file)], "is a file"),
    ):
        assert told in fails("compress", "no/such", out, "-s", "svd-llm", *text, *more)


def test_files_of_results_and_items_are_checked_before_the_model_loads(tmp_path):
    file = tmp_path / "no" / "plan.json"
    assert f"{file} cannot be written" in fails("plan", "./no/model", "-s", "svd", "--out", file)
    items = ("evaluate", "./no/model", "--tasks", "arc_easy", "--data", tmp_path)
    assert "has none of arc_easy.jsonl" in fails(*items)
    assert f"{tmp_path / 'none'}: no such directory" in fails("report", tmp_path / "none")


def test_the_model_writes_its_own_calibration_text(source, tmp_path):
    cut = ("--num-samples", 4, "--max-length", 16, "--temperature", 0.9)
    data = ("--calibration", "self", *cut)
    report = run("compress", source, tmp_path / "out", "--scheme", "kron", "--terms", 2, *data)
    assert report["data"]["temperature"] == 0.9
    for name, what in (("misspelt.txt", "does not exist"), (tmp_path, "is a directory")):
        result = CliRunner().invoke(
            cli.app, ["plan", str(source), "--scheme", "svd-llm", "--calibration", str(name)]
        )
        assert result.exit_code == 2
        assert what in re.sub(r"[│\s]+", " ", result.output)
