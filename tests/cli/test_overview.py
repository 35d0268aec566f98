"""The help of ``tnlm``: every command in a group, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_command

import tnlm
from tnlm.cli.main import app
from tnlm.cli.overview import GROUPS, main

COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


def test_every_command_is_in_a_group_with_its_own_text():
    texts = {name: command.help for name, command in get_command(app).commands.items()}
    assert texts == COMMANDS


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_the_help_shows_every_group_and_command(words):
    shown = started(*words)
    for name in (*GROUPS, *COMMANDS):
        assert name in shown


def test_the_version_is_printed():
    assert started("--version").strip() == tnlm.__version__


def test_ctrl_c_while_torch_is_imported_prints_nothing(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["tnlm", "compress"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")


def started(*words):
    """Return what tnlm prints in a process that must not import torch."""
    program = (
        "import sys; sys.modules['torch'] = None; "
        "from tnlm.cli.overview import main; sys.argv[0] = 'tnlm'; main()"
    )
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
