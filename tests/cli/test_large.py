"""The options of models that are larger than memory."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import tnlm
from tests.second_device import second_device
from tnlm.cli import main as cli
from tnlm.cli.large import load_on
from tnlm.errors import OptionError

FILES = ("--memory", "4GB")


@pytest.fixture
def source(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    words = [str(each) for each in arguments]
    return CliRunner().invoke(cli.app, words, catch_exceptions=False)


@pytest.mark.parametrize("files", [(), FILES])
def test_a_device_is_chosen_or_refused(files, source, tmp_path):
    call = "compress", source, tmp_path / "out", "--scheme", "svd", "--json", *files
    assert run(*call, "--device", "cpu").exit_code == 0
    assert tnlm.report(tmp_path / "out").plan.scheme == "svd"
    with pytest.raises(OptionError, match=r"device='nowhere' cannot be used: .*allowed here: cpu"):
        run(*call[:2], tmp_path / "other", *call[3:], "--device", "nowhere")
    assert not (tmp_path / "other").exists()


def test_a_plan_is_carried_out_from_files_to_files(source, tmp_path):
    made = tmp_path / "plan.json"
    assert run("plan", source, "-s", "svd", "--keep-targets", 0.6, "--out", made).exit_code == 0
    out = tmp_path / "out"
    assert run("compress", source, out, "--plan", made, *FILES, "--json").exit_code == 0
    kept = [layer.keep for layer in tnlm.report(out).plan.layers]
    assert kept == [layer.keep for layer in tnlm.Plan.load(made).layers]


def test_a_plan_is_made_on_a_device(source):
    assert run("plan", source, "--scheme", "svd", "--device", "cpu", "--json").exit_code == 0
    with second_device() as device:
        model, tokenizer = load_on(str(source), "auto", str(device))
        assert model.device == device
    assert tokenizer is None
