"""Every block of code in the guide on deployment runs, in order, on a tiny model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "deploy.md"
OPTIONAL = {"OnnxExporter": ("onnx", "onnxscript", "onnxruntime"), "torchao": ("torchao",)}


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|children_specs):FutureWarning")
def test_every_block_runs(tmp_path, monkeypatch, tiny_llama):
    tiny_llama(num_hidden_layers=1, eos_token_id=None).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.M | re.S)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for block in blocks:
        needed = [package for word, found in OPTIONAL.items() if word in block for package in found]
        if all(importlib.util.find_spec(package) for package in needed):
            exec(compile(block, str(GUIDE), "exec"), names)
    assert (tmp_path / "my-model-exported").is_dir()
