"""tnlm.load reads what lies in its directory, and runs no code that is not trusted."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import tnlm
from tnlm.errors import CheckpointError, OptionError

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found
"""


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def edit(directory, **fields):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.fixture
def model(compressed):
    return compressed("llama", "svd")


@pytest.fixture
def saved(model, tmp_path):
    return tnlm.save(model, tmp_path / "model")


@pytest.fixture
def no_answers(monkeypatch):
    """A standard input on which a question is an error."""

    class Silent(io.StringIO):
        def readline(self, *_):
            raise AssertionError("a question was asked")

    monkeypatch.setattr(sys, "stdin", Silent())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))


# Weights lie in the directory


def test_an_adapter_beside_the_weights_is_not_applied(model, saved, caplog):
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 99, "target_modules": ["lm_head"]}
    (saved / "adapter_config.json").write_text(json.dumps(adapter))
    (saved / "adapter_model.safetensors").write_bytes(b"broken")
    loaded = tnlm.load(saved)
    assert torch.equal(logits(loaded), logits(model))
    assert "has an adapter, which is not applied" in caplog.text
    (saved / "config.json" / "..").exists()  # nothing can lie where adapters are looked for
    assert not getattr(loaded, "_hf_peft_config_loaded", False)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["instead", "beside", "as safetensors", "in the index"])
def test_pickles_are_not_read(place, saved, tmp_path):
    bomb = pickle.dumps({"a": Bomb(tmp_path / "exploded")})
    (saved / "pytorch_model.bin").write_bytes(bomb)
    if place != "beside":
        (saved / "model.safetensors").unlink()
    if place == "as safetensors":
        (saved / "model.safetensors").write_bytes(bomb)
    if place == "in the index":
        index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    if place == "beside":
        tnlm.load(saved)
    else:
        with pytest.raises(CheckpointError, match="safetensors"):
            tnlm.load(saved)
    assert not (tmp_path / "exploded").exists()


def test_files_outside_are_not_read(saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "away.safetensors")
    (saved / "model.safetensors").symlink_to(tmp_path / "away.safetensors")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        tnlm.load(saved)
    (saved / "model.safetensors").unlink()
    edit(saved, transformers_weights="../away.safetensors")
    with pytest.raises(CheckpointError, match="names other weight files"):
        tnlm.load(saved)


def test_a_config_names_no_other_config(saved):
    shutil.copy(saved / "config.json", saved / "config.5.0.0.json")
    edit(saved, configuration_files=["config.5.0.0.json"])
    with pytest.raises(CheckpointError, match="names other configuration files"):
        tnlm.load(saved)


@pytest.mark.parametrize(
    "asked",
    [{"use_safetensors": False}, {"gguf_file": "x.gguf"}, {"state_dict": {"a": torch.ones(1)}},
     {"adapter_kwargs": {"subfolder": "x"}}],
)  # fmt: skip
def test_weights_from_elsewhere_cannot_be_asked_for(asked, saved):
    with pytest.raises(OptionError, match=next(iter(asked))):
        tnlm.load(saved, **asked)
    tnlm.load(saved, use_safetensors=True)


def test_generation_settings_are_read_and_must_be_json(model, saved):
    GenerationConfig(max_new_tokens=7).save_pretrained(saved)
    assert tnlm.load(saved).generation_config.max_new_tokens == 7
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not readable JSON"):
        tnlm.load(saved)


# What a config may ask for


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000; allowed: up to 100000"),
        ({"num_labels": 10**9}, "num_labels="),
        ({"num_hidden_layers": 90_000}, "more than .* modules"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"attn_implementation": "someone/kernel"}, "code from elsewhere"),
        ({"dtype": "int64"}, "has dtype 'int64'; allowed: float16"),
        ({"dtype": "float16"}, "no tensor is stored as F16"),
        ({"architectures": ["BertModel"]}, "BertModel does not fit the model type 'llama'"),
        ({"architectures": ["AutoModel"]}, "no known architecture"),
        ({"model_type": "nothing"}, "model type"),
    ],
)
def test_a_config_that_asks_too_much_is_an_error(fields, told, saved):
    edit(saved, **fields)
    with pytest.raises(CheckpointError, match=told):
        tnlm.load(saved)


def test_a_config_without_a_dtype_is_read_in_that_of_its_file(saved):
    edit(saved, dtype=...)
    assert tnlm.load(saved).dtype == torch.float32


# Code that a checkpoint brings


@pytest.fixture
def own(compressed, tmp_path, monkeypatch):
    """A checkpoint with classes of its own, which say so when they run."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    directory = tnlm.save(compressed("llama", "svd"), tmp_path / "own")
    (directory / "modeling_own.py").write_text(CODE)
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
    auto_map = {kind: f"modeling_own.{name}" for kind, name in names.items()}
    edit(directory, model_type="own-llama", architectures=["OwnModel"], auto_map=auto_map)
    return directory


def test_code_does_not_run_unless_it_is_trusted(own, no_answers, tmp_path):
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        tnlm.load(own)
    edit(own, model_type="llama")  # a type that transformers knows, a class that it does not
    with pytest.raises(CheckpointError, match="pass trust_remote_code=True to run the code"):
        tnlm.load(own)
    assert not list(tmp_path.rglob("ran"))


def test_code_that_is_not_needed_does_not_run(saved, model, no_answers, tmp_path):
    (saved / "evil.py").write_text(CODE)
    edit(saved, auto_map={"AutoConfig": "evil.OwnConfig", "AutoModelForCausalLM": "evil.OwnModel"})
    assert torch.equal(logits(tnlm.load(saved)), logits(model))
    assert not list(tmp_path.rglob("ran"))


def test_trusted_code_runs(own, model, no_answers, tmp_path):
    loaded = tnlm.load(own, trust_remote_code=True)
    assert (type(loaded).__name__, type(loaded.config).__name__) == ("OwnModel", "OwnConfig")
    assert torch.equal(logits(loaded), 2 * logits(model))
    again = tnlm.save(loaded, tmp_path / "again")
    assert (again / "modeling_own.py").exists()
    assert torch.equal(logits(tnlm.load(again, trust_remote_code=True)), 2 * logits(model))
    auto = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert torch.equal(logits(auto), 2 * logits(model))


# Where a checkpoint is


def test_a_subfolder_is_read(model, saved, tmp_path):
    (tmp_path / "all").mkdir()
    shutil.move(saved, tmp_path / "all" / "small")
    assert torch.equal(logits(tnlm.load(tmp_path / "all", subfolder="small")), logits(model))
    for subfolder in ("none", "../all", "/"):
        with pytest.raises(CheckpointError, match="subfolder="):
            tnlm.load(tmp_path / "all" / "small", subfolder=subfolder)


def test_trusted_code_is_found_in_a_subfolder(own, model, tmp_path):
    (tmp_path / "all").mkdir()
    shutil.move(own, tmp_path / "all" / "own")
    loaded = tnlm.load(tmp_path / "all", subfolder="own", trust_remote_code=True)
    assert torch.equal(logits(loaded), 2 * logits(model))


@pytest.mark.parametrize("source", ["./nothing", "/nothing/there", Path("nothing"), "~/nothing"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr("tnlm.checkpoint.location.cached_file", lambda *_, **__: pytest.fail("hub"))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        tnlm.load(source)


def cache(directory, root, subfolder=""):
    """Put a directory into a cache of the hub, as two revisions: one of them is broken."""
    home = root / "models--someone--model"
    for number, revision in enumerate(["main", "other"]):
        commit = str(number) * 40
        snapshot = home / "snapshots" / commit / subfolder
        snapshot.mkdir(parents=True)
        (home / "blobs").mkdir(exist_ok=True)
        for file in directory.iterdir():
            blob = home / "blobs" / f"{number}-{file.name}"
            shutil.copy(file, blob)
            if revision == "other" and file.name == "config.json":
                blob.write_text("{}")
            (snapshot / file.name).symlink_to(blob)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
    return {"cache_dir": root, "local_files_only": True}


@pytest.mark.parametrize("subfolder", ["", "small"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_repository_of_the_hub_is_read_from_its_cache(subfolder, sharded, model, tmp_path):
    shards = {"max_shard_size": "20KB"} if sharded else {}
    saved = tnlm.save(model, tmp_path / "model", **shards)
    (saved / "adapter_config.json").write_text("{}")
    where = cache(saved, tmp_path / "cache", subfolder)
    loaded = tnlm.load("someone/model", subfolder=subfolder, verify=True, **where)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(CheckpointError, match="not written by tnlm"):
        tnlm.load("someone/model", subfolder=subfolder, revision="other", **where)
    with pytest.raises(CheckpointError, match="cannot load someone/nothing"):
        tnlm.load("someone/nothing", **where)


def test_trusted_code_of_a_repository_runs(own, model, tmp_path):
    where = cache(own, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        tnlm.load("someone/model", **where)
    loaded = tnlm.load("someone/model", trust_remote_code=True, **where)
    assert torch.equal(logits(loaded), 2 * logits(model))


def test_the_token_reaches_every_request(saved, tmp_path, monkeypatch):
    seen = []

    def fetched(source, name, *, subfolder, **options):
        seen.append((name, options.get("token"), options.get("revision")))
        return str(saved / name) if (saved / name).exists() else None

    monkeypatch.setattr("tnlm.checkpoint.location.cached_file", fetched)
    monkeypatch.setattr("tnlm.checkpoint.location.hub_options", lambda *_, **__: {})
    tnlm.load("someone/model", token="secret", revision="v1")
    assert {"config.json", "model.safetensors"} <= {name for name, _, _ in seen}
    assert {(token, revision) for _, token, revision in seen} == {("secret", "v1")}


def test_other_arguments_reach_the_config(saved):
    loaded = tnlm.load(saved, attn_implementation="eager", output_attentions=True)
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.output_attentions
    assert AutoConfig.from_pretrained(saved).model_type == "llama"
