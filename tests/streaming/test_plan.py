"""A plan that was made earlier is carried out from files to files."""

from __future__ import annotations

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
