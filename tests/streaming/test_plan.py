"""A plan that was made earlier is carried out from files to files."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tnlm
from tnlm.errors import CheckpointError, OptionError, TargetError
from tnlm.streaming.pieces import Pieces

DATA = {"calibration": torch.arange(96) % 61 + 3, "max_length": 16}


@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "auto"])
def test_a_plan_gives_what_it_gives_in_memory(scheme, tiny_llama, both, same):
    model, data = tiny_llama(), {} if scheme == "svd" else DATA
    plan = tnlm.plan(model, scheme, keep_targets=0.6, progress=False, **data)
    same(*both(model, plan, **data))


@pytest.mark.parametrize("formats", [("low-rank", "channels", "heads"), ("channels",)])
def test_a_plan_with_channels_as_auto_once_made_it(formats, tiny_llama, both, same):
    scheme = dataclasses.replace(tnlm.scheme("auto"), formats=formats)
    plan = tnlm.plan(tiny_llama(), scheme, keep_targets=0.6, progress=False, **DATA)
    assert "channels" in {layer.format for layer in plan.layers}
    plan = tnlm.Plan.from_json(plan.to_json())
    memory, files = both(tiny_llama(), plan, **DATA)
    same(memory, files)
    direct = tnlm.compress(tiny_llama(), scheme, keep_targets=0.6, progress=False, **DATA)
    loaded = tnlm.load(memory)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("runtime", ["llama.cpp", "transformers"])
def test_a_plan_for_a_runtime_gives_the_same_model(runtime, tiny_llama, both, same):
    asked = {"keep_targets": 0.6, "portable": runtime, "progress": False, **DATA}
    wide = {"intermediate_size": 128}
    plan = tnlm.plan(tiny_llama(**wide), "auto", **asked)
    memory, files = both(tiny_llama(**wide), plan, **DATA)
    same(memory, files)
    direct = tnlm.compress(tiny_llama(**wide), "auto", **asked)
    assert tnlm.report(memory).plan.request == plan.request
    assert tnlm.load(memory).num_parameters() == direct.num_parameters()


def test_a_plan_in_few_bits_is_what_it_is_in_memory(tiny_llama, both, same):
    model = tiny_llama()
    plan = tnlm.plan(model, "svd-llm", keep_targets=0.6, progress=False, **DATA)
    same(*both(model, plan, precision="int8", **DATA))


def test_a_plan_is_given_alone_and_for_its_model(tiny_llama, tmp_path):
    model, source, out = tiny_llama(), tmp_path / "model", tmp_path / "out"
    plan = tnlm.plan(tiny_llama(num_hidden_layers=3), "svd", keep_targets=0.6, progress=False)
    model.save_pretrained(source)
    with pytest.raises(OptionError, match="a plan already holds targets, budget and options"):
        tnlm.compress_files(source, out, plan, keep=0.5, progress=False)
    with pytest.raises(OptionError, match="give it alone"):
        tnlm.compress_files(source, out, plan, targets="up_proj", progress=False)
    with pytest.raises(TargetError, match=r"layers\.2"):
        tnlm.compress_files(source, out, plan, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_goes_on_with_the_same_plan_only(tiny_llama, tmp_path, monkeypatch, same):
    model, source, out = tiny_llama(num_hidden_layers=4), tmp_path / "model", tmp_path / "out"
    model.save_pretrained(source)
    first, other = (tnlm.plan(model, "svd", keep_targets=k, progress=False) for k in (0.6, 0.5))
    write, count = Pieces._write, []

    def stop(self, block):
        count.append(block)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            tnlm.compress_files(source, out, first, progress=False)
    with pytest.raises(CheckpointError, match=r"unfinished run of another recipe: .*plan was"):
        tnlm.compress_files(source, out, other, progress=False)
    tnlm.compress_files(source, out, first, progress=False)
    tnlm.compress_files(source, tmp_path / "whole", first, progress=False)
    same(tmp_path / "whole", out)
