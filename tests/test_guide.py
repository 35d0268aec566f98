"""Every block of code in the guides runs, in order, on a tiny model."""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = DOCS / "guide"
OPTIONAL = {"OnnxExporter": ("onnx", "onnxscript", "onnxruntime"), "torchao": ("torchao",)}


def run_blocks(name: str) -> int:
    """Run the blocks whose packages are installed; return how many there are.

    A hundredth of the tokens that a real model learns from is enough for a tiny one.
    """
    text = (GUIDES / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    names: dict[str, object] = {}
    for block in blocks:
        needed = [package for word, found in OPTIONAL.items() if word in block for package in found]
        if all(importlib.util.find_spec(package) for package in needed):
            exec(compile(block.replace("200_000", "2_000"), name, "exec"), names)
    return len(blocks)


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|children_specs):FutureWarning")
def test_every_block_on_deployment_runs(tmp_path, monkeypatch, tiny_llama):
    tiny_llama(num_hidden_layers=1, eos_token_id=None).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert run_blocks("deploy.md") == 8
    assert (tmp_path / "my-model-exported").is_dir()


def test_every_block_on_serving_runs(tmp_path, monkeypatch, tiny_llama):
    tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert run_blocks("serve.md") == 6
    assert (tmp_path / "my-model-gguf" / "model-F16.gguf").is_file()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_every_block_on_training_runs(tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text(word_text(4096))
    monkeypatch.chdir(tmp_path)
    assert run_blocks("recover.md") == 9
    assert (tmp_path / "my-model-pruned" / "config.json").is_file()


def test_every_block_on_level_searches_runs(
    tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text
):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "search.txt").write_text(word_text(256))
    (tmp_path / "calibration.txt").write_text(word_text(2048))
    monkeypatch.chdir(tmp_path)
    assert run_blocks("level_search.md") == 1
    assert (tmp_path / "my-model-searched" / "config.json").is_file()


def test_every_block_on_design_spaces_runs(
    tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text
):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text(word_text(256))
    monkeypatch.chdir(tmp_path)
    assert run_blocks("design_space.md") == 6
    assert (tmp_path / "layers.csv").is_file()
    assert (tmp_path / "front.json").is_file()


def test_every_block_on_intrinsic_dimension_runs(
    tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text
):
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    tiny_llama(**small).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text(word_text(256))
    monkeypatch.chdir(tmp_path)
    assert run_blocks("intrinsic.md") == 2


def test_every_block_on_search_runs(tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    for seed, name in enumerate(("calibration", "search", "report")):
        (tmp_path / f"{name}.txt").write_text(word_text(256, seed=seed))
    monkeypatch.chdir(tmp_path)
    assert run_blocks("rank_search.md") == 3
    assert (tmp_path / "run" / "search.jsonl").is_file()


def test_every_block_on_evaluation_runs(tmp_path, monkeypatch, tiny_llama, word_tokenizer):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert run_blocks("evaluate.md") == 5
    assert (tmp_path / "dense.json").is_file()


def test_every_block_on_analysis_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks("analyze.md") == 5
    assert (tmp_path / "analysis" / "curves.csv").is_file()


def test_every_block_on_pictures_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks("pictures.md") == 3
    assert (tmp_path / "ranks.svg").is_file()
    assert (tmp_path / "my-model-small" / "report.html").is_file()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("../README.md", 3),
        ("index.md", 1),
        ("tour.md", 3),
        ("choose.md", 1),
        ("concepts/networks.md", 1),
        ("concepts/gauge.md", 1),
        ("concepts/allocation.md", 1),
        ("guide/large.md", 1),
        ("guide/large_models.md", 2),
        ("guide/experts.md", 4),
        ("guide/bits.md", 2),
        ("guide/rotation.md", 1),
        ("guide/reproduce.md", 2),
        ("guide/speed.md", 4),
    ],
)
def test_every_block_on_other_pages_runs(
    page, blocks, tmp_path, monkeypatch, tiny_llama, word_tokenizer, word_text
):
    small = {"num_hidden_layers": 1, "eos_token_id": None, "max_position_embeddings": 512}
    tiny_llama(**small).save_pretrained(tmp_path / "my-model")
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text(word_text(600))
    (tmp_path / "other.txt").write_text(word_text(600, seed=1))
    monkeypatch.chdir(tmp_path)
    assert run_blocks(f"../{page}") == blocks


@pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_every_block_on_several_devices_runs(tmp_path, monkeypatch, tiny_llama):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_blocks("distributed.md") == 6
    assert not torch.distributed.is_initialized()
    assert (tmp_path / "my-model-trained").is_dir()


def test_numbers_in_the_comments_of_pages_are_right():
    from tnlm.decompositions import get_format
    from tnlm.decompositions.low_rank import LowRankSpec
    from tnlm.decompositions.tensor_train import TensorTrainSpec

    train = get_format("tensor-train").network(
        (576, 576), TensorTrainSpec((8, 8, 9), (8, 8, 9), (32, 32))
    )
    networks = (DOCS / "concepts" / "networks.md").read_text()
    assert f"print(network.equation)  # {train.equation}" in networks
    assert f"print(network.params)  # {train.params} of {576 * 576}" in networks
    low_rank = get_format("low-rank")
    counts = [
        low_rank.network((576, 576), LowRankSpec(rank, gauge)).params
        for rank, gauge in ((128, False), (128, True), (576, True))
    ]
    gauge = (DOCS / "concepts" / "gauge.md").read_text()
    assert f"# {counts[0]} {counts[1]}" in gauge
    assert f"# {counts[2]}: never more" in gauge


def test_every_block_on_extending_runs(tmp_path, monkeypatch, tiny_llama):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert run_blocks("extend.md") == 10


def test_every_block_on_calibration_runs(tmp_path, monkeypatch, word_tokenizer):
    word_tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert run_blocks("calibration.md") == 4
