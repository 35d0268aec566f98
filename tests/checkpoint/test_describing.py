from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import tnlm
from tests.hostile.draft import ODD
from tnlm.checkpoint.describing import describe
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.cli.main import app
from tnlm.errors import TnlmError

FIELDS = ["architectures", "quantization_config"]
OURS = ["quant_method", "format_version", "scheme", "options", "modules", "tied"]


@pytest.fixture(scope="module")
def saved(compressed, tmp_path_factory):
    return tnlm.save(compressed("gpt2", "kron"), tmp_path_factory.mktemp("all") / "model")


@pytest.fixture
def odd(saved):
    """Change the files of a saved model for one test."""
    files = {name: (saved / name).read_bytes() for name in ("config.json", REPORT_FILE)}

    def change(name, path, value):
        found = json.loads(files[name])
        *parents, last = path
        owner = found
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
        (saved / name).write_text(json.dumps(found))
        return saved

    yield change
    for name, text in files.items():
        (saved / name).write_bytes(text)


def told_or_refused(directory):
    """Describe a directory, as a function and, where that works, as a command."""
    try:
        describe(directory)
    except TnlmError:
        return
    assert CliRunner().invoke(app, ["info", str(directory)]).exit_code == 0


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_odd_configs_are_told_or_refused(value, odd):
    paths = [[name] for name in FIELDS] + [["quantization_config", name] for name in OURS]
    module = ["quantization_config", "modules", "transformer.h.0.attn.c_attn"]
    paths += [module, [*module, "kind"], [*module, "parts"], [*module, "parts", 0]]
    paths += [[*module, "parts", 0, name] for name in ("format", "options", "shape")]
    for path in paths:
        told_or_refused(odd("config.json", path, value))


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_odd_reports_are_told_or_refused(value, odd, saved):
    for name in ("metric", "parameters_before", "macs_after", "layers", "sha256"):
        told_or_refused(odd(REPORT_FILE, [name], value))


def test_text_that_a_terminal_takes_for_commands_is_harmless(odd):
    for text in ("[/red]", "[bold", "\x1b[2J", "\ud800", "a\nb"):
        directory = odd("config.json", ["architectures"], [text])
        done = CliRunner().invoke(app, ["info", str(directory)])
        assert done.exit_code == 0
        assert "\x1b[2J" not in done.stdout


def test_a_sound_directory_is_described(saved):
    found = describe(saved)
    assert (found["architecture"], found["scheme"]) == ("GPT2LMHeadModel", "kron")
    assert found["parameters"] == tnlm.load(saved).num_parameters()
