"""`tnlm compress --jobs` and `torchrun -m tnlm compress` write what one process writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tnlm.cli.main import app

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are started as on Linux")


@pytest.fixture
def command(tmp_path, tiny_llama, word_tokenizer, word_text):
    """Words that compress a model on data, without the output."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().save_pretrained(model)
    word_tokenizer.save_pretrained(model)
    text.write_text(word_text(200))
    options = ["--scheme", "svd-llm", "--keep-targets", "0.6", "--max-length", "16"]
    return ["compress", str(model), *options, "--calibration", str(text)]


def run(words, **variables):
    env = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env)


def weights(folder: Path):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--jobs", "torchrun"])
def test_two_processes_write_what_one_does(way, command, tmp_path):
    name, source, *options = command
    alone, shared = ([name, source, str(tmp_path / out), *options] for out in ("one", "two"))
    assert run([sys.executable, "-m", "tnlm", *alone]).returncode == 0
    if way == "--jobs":
        done = run([sys.executable, "-m", "tnlm", *shared, "--jobs", "2"])
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = run([*torchrun, "--nproc-per-node", "2", "-m", "tnlm", *shared])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_plan_as_one_does(command):
    plan = ["plan", *command[1:], "--json"]
    one, two = (run([sys.executable, "-m", "tnlm", *plan, *more]) for more in ([], ["--jobs", "2"]))
    assert one.returncode == two.returncode == 0, two.stderr
    assert json.loads(one.stdout) == json.loads(two.stdout)


@pytest.mark.parametrize("option", ["--jobs=2", "--device=warp:7", "--out=plan.json"])
def test_resources_take_no_option_of_a_run(command, option):
    done = CliRunner().invoke(app, ["plan", *command[1:], "--resources", option])
    name = option.partition("=")[0]
    assert f"--resources runs nothing, so {name} has no effect" in str(done.exception)


@pytest.mark.slow
def test_a_killed_process_ends_the_command(command, tmp_path):
    name, source, *options = command
    words = [name, source, str(tmp_path / "out"), *options, "--jobs", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "tnlm", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as started:
        victim = _a_child(started.pid)
        os.kill(victim, signal.SIGKILL)
        _, said = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "ProcessError: process" in said
    assert "was ended by SIGKILL" in said
    assert not (tmp_path / "out").exists()


def _a_child(parent: int) -> int:
    """Return a process that does the work of a command."""
    for _ in range(600):
        try:
            path = Path(f"/proc/{parent}/task/{parent}/children")
            for child in map(int, path.read_text().split()):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        except FileNotFoundError:
            pytest.skip("the system does not list processes")
        time.sleep(0.1)
    raise AssertionError("no process was started")


@pytest.mark.parametrize(
    ("jobs", "variables", "words"),
    [
        ("0", {}, "jobs 0; allowed: a whole number >= 1"),
        ("3", {"WORLD_SIZE": "2"}, "jobs 3, but this process is one of 2"),
    ],
)
def test_jobs_are_checked_before_work(jobs, variables, words, monkeypatch, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = ["compress", "model", str(tmp_path / "out"), "--scheme", "svd", "--jobs", jobs]
    done = CliRunner().invoke(app, command)
    assert words.replace("jobs ", "jobs=") in str(done.exception)
