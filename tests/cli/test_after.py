"""Commands for a compressed model: it is trained, made dense, and generates."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tnlm
from tnlm.cli import main as cli

IDS = torch.arange(12).reshape(1, 12) + 3


@pytest.fixture
def small(tmp_path, tiny_llama, word_tokenizer):
    model = tnlm.compress(tiny_llama(eos_token_id=None), "svd", keep_targets=0.6, progress=False)
    return tnlm.save(model, tmp_path / "small", tokenizer=word_tokenizer)


def run(*arguments):
    words = [str(a) for a in (*arguments, "--json")]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_healed_model_is_saved_and_differs(small, tmp_path, word_text):
    (tmp_path / "text.txt").write_text(word_text(300))
    out = tmp_path / "healed"
    chosen = ("--tokens", 64, "--max-length", 16, "--learning-rate", 0.01)
    assert "model.safetensors" in run("heal", small, out, tmp_path / "text.txt", *chosen)
    before, after = tnlm.load(small), tnlm.load(out)
    assert not torch.equal(before(IDS).logits, after(IDS).logits)
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in after.parameters())


def test_a_dense_model_has_the_same_logits_and_its_tokenizer(small, tmp_path):
    files = run("to-dense", small, tmp_path / "dense")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "tnlm" not in (tmp_path / "dense" / "config.json").read_text()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(dense(IDS).logits, tnlm.load(small)(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("command", ["heal", "to-dense", "export"])
def test_an_output_that_holds_files_is_refused_before_work(command, small, tmp_path):
    (tmp_path / "text.txt").write_text("word1 word2")
    more = {"heal": [tmp_path / "text.txt"], "export": ["--to", "transformers"]}
    words = [str(word) for word in (command, small, tmp_path, *more.get(command, []))]
    with pytest.raises(tnlm.TnlmError, match="not empty"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_a_text_is_continued(small):
    made = run("generate", small, "word1 word2", "--max-new-tokens", 4)
    assert made["prompt"] == "word1 word2"
    assert 1 <= len(made["text"].split()) <= 4


def test_without_a_tokenizer_nothing_is_continued(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(tnlm.TnlmError, match="no tokenizer"):
        CliRunner().invoke(
            cli.app, ["generate", str(tmp_path / "model"), "word1"], catch_exceptions=False
        )


def test_the_version_and_short_help():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == tnlm.__version__
    for words in (["-h"], ["generate", "-h"]):
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0
        assert "Usage" in result.stdout


@pytest.mark.parametrize("prompt", ["", " "], ids=["empty", "blank"])
def test_nothing_to_continue_is_refused(prompt, small):
    with pytest.raises(tnlm.TnlmError, match="no token"):
        CliRunner().invoke(cli.app, ["generate", str(small), prompt], catch_exceptions=False)


def test_a_model_that_writes_nothing_is_refused(tmp_path, tiny_bert, word_tokenizer):
    tiny_bert().save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(tnlm.TnlmError, match="does not generate text"):
        CliRunner().invoke(
            cli.app, ["generate", str(tmp_path / "model"), "word1"], catch_exceptions=False
        )


def test_a_typo_in_the_kind_of_file_is_found_before_the_model_is_loaded(tmp_path):
    words = ["export", "no-such-model", str(tmp_path / "out"), "--to", "ggfu"]
    with pytest.raises(tnlm.TnlmError, match="gguf"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_help_of_a_program_that_is_run_is_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr("tnlm.runtimes.run.run", seen.append)
    assert CliRunner().invoke(cli.app, ["run", "json.tool", "-h"]).exit_code == 0
    assert seen == [["json.tool", "-h"]]
