"""Every tnlm command that a page prints runs as printed, in one directory, in the page's order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tnlm.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"), key=str)]
PAGES += sorted((ROOT / "docs" / "guide").glob("*.md"), key=str)


def commands(page):
    """Return the words after ``tnlm`` of every line that is a command."""
    lines = re.findall(r"^ {4}tnlm (.*)$", page.read_text(), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def directory(tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text):
    """What the pages speak of: MODEL, texts of it, and TASKS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNLM_HOME", str(tmp_path / "home"))
    word_tokenizer.model_max_length = 2048
    for saved in (tiny_llama(max_position_embeddings=2048), word_tokenizer):
        saved.save_pretrained("MODEL")
    for seed, name in enumerate(("text.txt", "other.txt", "a.txt", "b.txt")):
        Path(name).write_text(word_text(1100, seed=seed))
    Path("TASKS").mkdir()
    row = {"query": "word1 word2", "choices": ["word3", "word4"], "gold": 1}
    for name in ("arc_easy_test", "piqa_val"):
        Path("TASKS", f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 3))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.name
)
@pytest.mark.usefixtures("directory")
def test_commands_run_as_printed(page):
    for words in commands(page):
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)


def test_the_readme_has_commands_and_names_each_but_those_about_tnlm():
    named = {words[0] for words in commands(ROOT / "README.md")}
    elsewhere = {"export", "run", "serve"}  # in tests/runtimes: what they take depends on the model
    assert set(get_command(cli.app).commands) - named == {"info", "demo", *elsewhere}
