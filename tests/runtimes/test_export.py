from __future__ import annotations

import json

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tnlm.cli import main as cli


def test_the_shell_writes_both_kinds_of_files(tiny_llama, ids, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    for to in ("transformers", "gguf"):
        words = ["export", str(tmp_path / "model"), str(tmp_path / to), "--to", to, "--json"]
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        files = {path.name: path.stat().st_size for path in (tmp_path / to).iterdir()}
        assert json.loads(result.stdout) == files
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers").eval()
    assert loaded(ids).logits.equal(model(ids).logits)
    assert (tmp_path / "gguf" / "model-F16.gguf").is_file()
