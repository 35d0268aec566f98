"""Every notebook of the gallery runs as downloaded: alone in a folder, given what a kernel is."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from transformers.utils import logging

import tnlm
from tests.test_examples import CHECKS, EXAMPLES, NAMES

DOCS = EXAMPLES.parent / "docs"
QUICK = ("first_compression", "shapeshifter")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*(LeafSpec|children_specs):FutureWarning",
)


@pytest.fixture
def gallery(monkeypatch):
    pytest.importorskip("sphinx_gallery")
    monkeypatch.syspath_prepend(str(DOCS))
    import gallery

    yield gallery
    sys.modules.pop("gallery")


@pytest.fixture
def notebook(gallery):
    """Return the cells of code of the notebook that the gallery makes of an example."""
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    settings = {
        "first_notebook_cell": gallery.first_cell(EXAMPLES),
        "last_notebook_cell": None,
        "notebook_images": False,
        "promote_jupyter_magic": False,
        "pypandoc": False,
        "notebook_extensions": {"py"},
    }

    def make(name: str) -> list[str]:
        _, blocks = split_code_and_text_blocks(str(EXAMPLES / f"{name}.py"))
        made = jupyter_notebook(blocks, settings, str(DOCS))
        return ["".join(c["source"]) for c in made["cells"] if c["cell_type"] == "code"]

    return make


@pytest.fixture
def kernel(tmp_path, monkeypatch, capsys, registries):
    """Return a function that runs cells as a kernel does, and returns what they print."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    sys.modules.pop("tiny", None)

    def run(cells: list[str]) -> str:
        names = {"__name__": "__main__"}
        for cell in cells:
            magic, _, rest = cell.partition("\n")
            if magic.startswith("%pip install "):
                continue
            if magic.startswith("%%writefile "):
                Path(magic.split()[1]).write_text(rest)
            else:
                exec(compile(cell, "cell", "exec"), names)
        return capsys.readouterr().out

    yield run
    plt.close("all")
    sys.modules.pop("tiny", None)
    logging.enable_progress_bar()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_a_notebook_runs_as_downloaded(name, notebook, kernel, tmp_path):
    CHECKS[name](kernel(notebook(name)))
    assert (tmp_path / "tiny.py").is_file()


def test_the_first_compression_comes_first(gallery):
    files = [f"{name}.py" for name in NAMES]
    assert sorted(files, key=gallery.FirstOnTop("examples"))[0] == "first_compression.py"


def test_a_model_of_the_hub_is_compressed(
    kernel, tmp_path, tiny_llama, word_tokenizer, word_text, monkeypatch
):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    wiki = {part: {"text": [word_text(9000, seed=2)]} for part in ("validation", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *_: wiki)
    stored = json.loads((EXAMPLES / "from_the_hub.ipynb").read_text())["cells"]
    cells = ["".join(cell["source"]) for cell in stored if cell["cell_type"] == "code"]
    [named] = [number for number, cell in enumerate(cells) if cell.startswith("MODEL = ")]
    cells[named] = f"MODEL, KEEP = {str(tmp_path / 'model')!r}, 0.8"
    assert all(not cell.get("outputs") for cell in stored)
    assert "word" in kernel(cells)
    kept = tnlm.report(tmp_path / "smaller").plan
    assert kept.targets_after.params <= 0.8 * kept.targets_before.params
