from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

import tnlm
from tests.conftest import cover
from tnlm.checkpoint import transformers_plugin as huggingface
from tnlm.checkpoint.transformers_plugin import GUARD
from tnlm.errors import CheckpointError, ModelError

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
HEADLESS = ["svd", "kron", "albert", "tensorgpt", "afm", "basis-sharing", "modegpt"]
PAIRS = cover("llama", "tied-llama", "gpt2", "masked-bert")
PAIRS += [("bert", scheme) for scheme in HEADLESS]
QUERY = "model.layers.0.self_attn.q_proj"


def outputs(model):
    with torch.no_grad():
        return model(IDS)[0]


def in_bfloat16(model):
    """Round the parameters; buffers that are never saved (rotary frequencies) stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def edit(directory, change):
    """Change the config of a saved model, as a broken or hostile file would be."""
    config = config_of(directory)
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


# What is written is what is read


@pytest.mark.parametrize(("kind", "scheme"), PAIRS)
def test_a_loaded_model_is_the_saved_one(kind, scheme, compressed, tmp_path):
    model = compressed(kind, scheme)
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert not loaded.training
    counts = [sum(p.numel() for p in m.parameters()) for m in (loaded, model)]
    assert counts[0] == counts[1]  # so that ties are ties again


@pytest.mark.parametrize("scheme", ["svd", "albert", "tensorgpt"])
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
def test_bfloat16_and_shards_change_nothing(kind, scheme, compressed, tmp_path):
    model = in_bfloat16(compressed(kind, scheme))
    directory = tnlm.save(model, tmp_path / "model", max_shard_size="10KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    loaded = tnlm.load(directory)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_dtype_may_be_asked_for(compressed, saved):
    loaded = tnlm.load(saved, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    expected = outputs(in_bfloat16(compressed("llama", "svd")))
    assert torch.equal(outputs(loaded), expected)


def test_dense_parts_of_fused_modules_are_kept(make_model, tmp_path):
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :32] = 0.01
    tnlm.compress(model, "svd", tolerance=1e-3, targets=["h.0.attn.c_attn"])
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert torch.equal(outputs(loaded), outputs(model))


def test_saving_again_writes_the_same(saved, tmp_path):
    again = tnlm.save(tnlm.load(saved), tmp_path / "again")
    names = ["model.safetensors", "generation_config.json"]
    for name in names:
        assert (again / name).read_bytes() == (saved / name).read_bytes()
    assert config_of(again) == config_of(saved)


def test_the_report_and_the_tokenizer_lie_beside_the_weights(compressed, word_tokenizer, tmp_path):
    model = compressed("gpt2", "kron")
    directory = tnlm.save(model, str(tmp_path / "new" / "model"), tokenizer=word_tokenizer)
    assert isinstance(directory, Path)
    record = json.loads((directory / "tnlm_report.json").read_text())
    assert record.pop("sha256").keys() == {"config.json", "model.safetensors"}
    assert record == json.loads(json.dumps(tnlm.report(model).to_dict()))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == word_tokenizer.get_vocab()


def test_the_config_says_what_the_design_promises(saved):
    stored = config_of(saved)["quantization_config"]
    assert stored["quant_method"] == "tnlm"
    assert stored["format_version"] == 3
    asked = {"max_macs": 1.0, "unit": "params", "allocation": "uniform", "cascade": "none"}
    assert (stored["scheme"], stored["options"], stored["tied"]) == ("svd", asked, {})
    entry = stored["modules"][QUERY]
    assert (entry["format"], entry["shape"]) == ("low-rank", [32, 32])


def test_nothing_but_safetensors_and_json_is_written(saved):
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}


# Without tnlm


def test_without_the_plug_in_loading_stops_at_the_guard(saved, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "tnlm")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "tnlm")
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(OSError, match=GUARD):
            kind.from_pretrained(saved)


@pytest.mark.slow
def test_transformers_alone_stops_at_the_guard(saved):
    script = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"except OSError as error: assert {GUARD!r} in str(error), error\n"
        "else: raise SystemExit('it loaded')\n"
        "assert 'tnlm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, saved], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Where it cannot be written


def test_a_dense_model_is_not_saved(make_model, tmp_path):
    with pytest.raises(ModelError, match=r"not compressed by tnlm; use model\.save_"):
        tnlm.save(make_model("llama"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_directory(overwrite, compressed, tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    for target in (path, path / "below"):
        with pytest.raises(CheckpointError, match="file"):
            tnlm.save(compressed("llama", "svd"), target, overwrite=overwrite)
    assert path.read_text() == "kept"


def test_what_a_directory_holds_is_kept_unless_it_may_go(compressed, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    tnlm.save(compressed("llama", "svd"), directory)  # an empty one is fine
    (directory / "notes").write_text("mine")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(
        CheckpointError, match="is not empty; choose another, or pass overwrite=True"
    ):
        tnlm.save(compressed("llama", "kron"), directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    tnlm.save(compressed("llama", "kron"), directory, overwrite=True)
    assert not (directory / "notes").exists()
    assert torch.equal(outputs(tnlm.load(directory)), outputs(compressed("llama", "kron")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_without_permission_is_named(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may do anything
    with pytest.raises(CheckpointError, match=f"no permission in {tmp_path}"):
        tnlm.save(compressed("llama", "svd"), tmp_path / "new" / "model")
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_made_is_named(compressed):
    with pytest.raises(CheckpointError, match="/proc/tnlm/model"):
        tnlm.save(compressed("llama", "svd"), "/proc/tnlm/model")


@pytest.mark.parametrize(
    "error", [OSError("disk full"), SafetensorError("disk full"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("step", ["weights", "sums", "move"])
def test_a_save_that_fails_leaves_the_old_files(step, error, compressed, saved, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model, real = compressed("llama", "kron"), Path.replace

    def fail_at_the_second(source, target):
        return fail() if source.name == "new" else real(source, target)

    if step == "weights":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    elif step == "sums":
        monkeypatch.setattr("tnlm.checkpoint.saving.record_sums", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail_at_the_second)
    expected = CheckpointError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected):
        tnlm.save(model, saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


# What cannot be read


def test_load_wants_a_directory_of_tnlm(make_model, tmp_path):
    with pytest.raises(CheckpointError, match="cannot load"):
        tnlm.load(tmp_path / "nothing")
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"not written by tnlm; use AutoModel"):
        tnlm.load(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load"):
        tnlm.load(tmp_path / "dense")


@pytest.mark.parametrize("kept", [0, 7, 1000, 0.5, -1])
def test_a_truncated_file_is_an_error(kept, saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    with pytest.raises(CheckpointError, match="cannot load"):
        tnlm.load(saved)


def test_a_missing_shard_is_an_error(compressed, tmp_path):
    directory = tnlm.save(compressed("llama", "svd"), tmp_path / "m", max_shard_size="20KB")
    next(directory.glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="cannot load"):
        tnlm.load(directory)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(f"{QUERY}.left.weight"), "missing keys: .*q_proj.left.weight"),
        (lambda t: t.pop(f"{QUERY}.right_order"), "missing keys: .*q_proj.right_order"),
        (lambda t: t.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected keys: extra"),
        (lambda t: t.update({f"{QUERY}.weight": torch.ones(32, 32)}), "unexpected keys: .*q_proj"),
        (lambda t: t.update({f"{QUERY}.left.weight": torch.ones(2, 2)}), "mismatch"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "mismatch"),
    ],
)
def test_every_tensor_must_be_there_and_none_more(change, problem, saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=problem):
        tnlm.load(saved)


def entry(**changes):
    """Change the first module's entry; a change to `...` drops the key."""

    def change(stored):
        found = stored["modules"][QUERY]
        found.update(changes)
        stored["modules"][QUERY] = {k: v for k, v in found.items() if v is not ...}

    return change


def options(**changes):
    def change(stored):
        stored["modules"][QUERY]["options"].update(changes)

    return change


def whole(value):
    def change(stored):
        stored["modules"][QUERY] = value

    return change


def rename(name):
    def change(stored):
        stored["modules"] = {name: stored["modules"].pop(QUERY), **stored["modules"]}

    return change


HUGE = 10**12
BROKEN = {
    "another shape": entry(shape=[32, 48]),
    "a huge shape": entry(shape=[HUGE, HUGE]),
    "a negative shape": entry(shape=[-32, -32]),
    "a fractional shape": entry(shape=[32.0, 32.5]),
    "floats as shape": entry(shape=[32.0, 32.0]),
    "one size": entry(shape=[32]),
    "three sizes": entry(shape=[32, 32, 32]),
    "a word as shape": entry(shape="32"),
    "no shape": entry(shape=...),
    "a rank too large": options(rank=33),
    "a huge rank": options(rank=HUGE),
    "rank zero": options(rank=0),
    "a word as rank": options(rank="4"),
    "a growing rank": options(rank=32, gauge=False),
    "an unknown option": options(ranc=3),
    "no options": entry(options=...),
    "a list of options": entry(options=[1]),
    "an unknown format": entry(format="lowrank"),
    "a format that is no word": entry(format=["low-rank"]),
    "no format": entry(format=...),
    "a format for embeddings": entry(
        format="token-mps", options={"in_split": [4, 8], "ranks": [1]}, order=["core0", "core1"]
    ),
    "a huge split": entry(
        format="kronecker", options={"terms": 1, "out_split": [HUGE, 1], "in_split": [4, 8]}
    ),
    "a huge number of modes": entry(
        format="tucker", options={"out_split": [1] * 9999 + [32], "in_split": [32], "ranks": [1]}
    ),
    "an unknown kind": entry(kind="conv"),
    "no kind": entry(kind=...),
    "a kind that is a list": entry(kind=["linear"]),
    "an embedding": entry(kind="embedding", padding_idx=None),
    "a head": entry(kind="head"),
    "a bias": entry(bias=True),
    "no word on the bias": entry(bias=...),
    "a strange bias": entry(bias="no"),
    "an order of other factors": entry(order=["left", "middle"]),
    "an order that cannot be run": entry(order=["left", "right"]),
    "no order": entry(order=...),
    "an order that is a number": entry(order=3),
    "no parts": whole({"kind": "fused", "parts": []}),
    "parts of other widths": whole(
        {"kind": "fused", "parts": [
            {"name": "a", "kind": "dense", "shape": [16, 32], "bias": False},
            {"name": "b", "kind": "dense", "shape": [16, HUGE], "bias": False},
        ]}
    ),
    "parts of negative sizes": whole(
        {"kind": "fused", "parts": [
            {"name": "a", "kind": "dense", "shape": [HUGE, 32], "bias": False},
            {"name": "b", "kind": "dense", "shape": [32 - HUGE, 32], "bias": False},
        ]}
    ),
    "parts of one name": whole(
        {"kind": "fused", "parts": [
            {"name": "a", "kind": "dense", "shape": [16, 32], "bias": False},
            {"name": "a", "kind": "dense", "shape": [16, 32], "bias": False},
        ]}
    ),
    "a part with a dotted name": whole(
        {"kind": "fused", "parts": [
            {"name": "a.b", "kind": "dense", "shape": [32, 32], "bias": False},
        ]}
    ),
    "a part inside a part": whole(
        {"kind": "fused", "parts": [{"name": "a", "kind": "fused", "shape": [32, 32], "parts": []}]}
    ),
    "an entry that is a list": whole([1, 2]),
    "an entry that is nothing": whole(None),
    "an unknown module": rename("model.layers.0.self_attn.x_proj"),
    "a layer too many": rename("model.layers.7.self_attn.q_proj"),
    "a module of another class": rename("model.norm"),
    "a container": rename("model.layers"),
    "the model itself": rename(""),
    "a dunder name": rename("model.__class__"),
    "a later layout": lambda stored: stored.update(format_version=99),
    "a layout that is a word": lambda stored: stored.update(format_version="3"),
    "a list of modules": lambda stored: stored.update(modules=[1]),
    "a number of modules": lambda stored: stored.update(modules=3),
    "a list of ties": lambda stored: stored.update(tied=[1]),
    "a tie of what is not there": lambda stored: stored.update(
        tied={f"{QUERY}.nothing": f"{QUERY}.left.weight"}
    ),
    "a tie that is a number": lambda stored: stored.update(tied={f"{QUERY}.left.weight": 3}),
    "a tie of other shapes": lambda stored: stored.update(
        tied={f"{QUERY}.left.weight": "model.layers.0.mlp.up_proj.right.weight"}
    ),
    "options that are a number": lambda stored: stored.update(options=3),
}  # fmt: skip


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_config_that_does_not_fit_is_an_error_before_anything_is_allocated(
    change, saved, monkeypatch
):
    def build(entry, *, device, dtype):
        assert torch.device(device).type == "meta"
        return real(entry, device=device, dtype=dtype)

    real = huggingface.build
    monkeypatch.setattr(huggingface, "build", build)
    edit(saved, change)
    with pytest.raises(CheckpointError):
        tnlm.load(saved)


def test_a_config_that_does_not_fit_names_the_layer_and_what_it_can_have(saved):
    edit(saved, options(rank=33))
    with pytest.raises(CheckpointError, match=rf"does not fit the model at {QUERY}: .* 1 to 32"):
        tnlm.load(saved)


@pytest.mark.parametrize(
    "tied",
    [
        {"lm_head.left": "model.embed_tokens.right"},
        {"lm_head.middle": "model.embed_tokens.left"},
        {"lm_head.left": "model.embed_tokens.weight"},
        {},
    ],
)
def test_ties_must_join_what_the_tables_hold(tied, compressed, tmp_path):
    directory = tnlm.save(compressed("tied-llama", "albert"), tmp_path / "model")
    edit(directory, lambda stored: stored.update(tied=tied))
    with pytest.raises(CheckpointError):
        tnlm.load(directory)


def test_a_quantization_config_that_is_none_is_an_error(saved):
    for value in (None, 3, [], "tnlm", {"quant_method": "tnlm"}):
        config = config_of(saved)
        config["quantization_config"] = value
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            tnlm.load(saved)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], "x", [3], ["__version__"]])
def test_an_unknown_architecture_is_an_error(architectures, saved):
    config = config_of(saved)
    config["architectures"] = architectures
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        tnlm.load(saved)
