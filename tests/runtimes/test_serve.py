"""`tnlm serve` answers over HTTP; `make test-serving` installs what the server needs."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

import tnlm
from tnlm.cli import main as cli
from tnlm.errors import CheckpointError, ModelError
from tnlm.runtimes import serve as serving
from tnlm.runtimes.serve import check_servable

CHAT = [{"role": "user", "content": "word1 word2 word3"}]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} word60 {% endfor %}"


@pytest.fixture
def saved(tiny_llama, word_tokenizer, tmp_path):
    """Save a compressed model with its tokenizer; return both."""
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.5, progress=False)
    word_tokenizer.save_pretrained(tmp_path / "model")
    tokenizer = type(word_tokenizer).from_pretrained(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    tnlm.save(model, tmp_path / "model", tokenizer=tokenizer, overwrite=True)
    return model, tokenizer, tmp_path / "model"


@pytest.fixture
def address(saved):
    """Serve the model; return where."""
    for package in serving.PACKAGES:
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tnlm", "serve", str(saved[2]), *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        wait(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def wait(url, server):
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            return urllib.request.urlopen(url, timeout=5)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(url)


def post(url, body):
    asked = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read().decode()


def test_a_chat_is_answered_as_generate_answers_it(saved, address):
    model, tokenizer, directory = saved
    body = {"model": str(directory), "messages": CHAT, "max_tokens": 8, "temperature": 0}
    answer = json.loads(post(f"{address}/chat/completions", body))
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == expected

    events = post(f"{address}/chat/completions", body | {"stream": True})
    sent = [line[6:] for line in events.splitlines() if line.startswith("data: {")]
    parts = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in sent]
    assert "".join(parts) == expected


def test_a_directory_without_a_tokenizer_is_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        check_servable(tmp_path)


def test_a_directory_for_vllm_is_refused(saved, tmp_path):
    tnlm.export(saved[0], tmp_path / "vllm", to="vllm", tokenizer=saved[1])
    with pytest.raises(CheckpointError, match="was exported for vLLM, which alone runs it"):
        check_servable(tmp_path / "vllm")


def test_a_missing_package_is_named(saved, monkeypatch):
    monkeypatch.setattr(serving, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ModelError, match=r"needs no_such_package: pip install 'tnlm\[serve\]'"):
        check_servable(saved[2])


def test_a_missing_chat_template_is_warned_of(saved, monkeypatch, caplog):
    monkeypatch.setattr(serving, "PACKAGES", ())
    with caplog.at_level(logging.WARNING, "tnlm"):
        check_servable(saved[2])
        assert not caplog.records
        (saved[2] / "chat_template.jinja").unlink()
        check_servable(saved[2])
    assert "no chat template: it answers /v1/completions only" in caplog.text


def test_the_shell_hands_options_over(saved, monkeypatch):
    ran = []
    monkeypatch.setattr(serving, "PACKAGES", ())
    monkeypatch.setattr(serving, "run", ran.append)
    result = CliRunner().invoke(cli.app, ["serve", str(saved[2]), "--port", "8001"])
    assert result.exit_code == 0, result.output
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    assert ran == [[*program, str(saved[2]), "--port", "8001"]]


def test_a_server_that_compiles_is_another_program(saved, monkeypatch):
    ran = []
    monkeypatch.setattr(serving, "PACKAGES", ())
    monkeypatch.setattr(serving, "run", ran.append)
    result = CliRunner().invoke(cli.app, ["serve", str(saved[2]), "--compile"])
    assert result.exit_code == 0, result.output
    program = [sys.executable, "-m", "tnlm.runtimes.compiled_server", "serve"]
    assert ran == [[*program, str(saved[2]), "--compile"]]
