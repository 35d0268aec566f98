from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tnlm
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.cli.main import app
from tnlm.errors import CheckpointError

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(compressed, tmp_path):
    return tnlm.save(compressed("llama", "svd"), tmp_path / "model", max_shard_size="20KB")


def exchange(directory):
    """Exchange two factors of one shape, which nothing else can see."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        names = [n for n, t in tensors.items() if t.shape == tensors[next(iter(tensors))].shape]
        if len(names) > 1:
            a, b = names[:2]
            tensors[a], tensors[b] = tensors[b], tensors[a]
            save_file(tensors, path, metadata={"format": "pt"})
            return path.name
    raise AssertionError("no two tensors of one shape")


def test_a_saved_model_is_what_was_saved(saved):
    sums = tnlm.verify(saved)
    files = {
        "config.json",
        "model.safetensors.index.json",
        *(f.name for f in saved.glob("*.safetens*")),
    }
    assert sums.keys() == files
    assert all(len(one) == 64 for one in sums.values())
    tnlm.load(saved, verify=True)


def test_exchanged_factors_are_seen(saved):
    name = exchange(saved)
    tnlm.load(saved)
    for check in (tnlm.verify, lambda d: tnlm.load(d, verify=True)):
        with pytest.raises(CheckpointError, match=f"is not what was saved: {name} differs"):
            check(saved)


def test_every_file_that_differs_is_named(saved):
    first, second = sorted(saved.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1] + b"\1")
    second.rename(saved / "other.safetensors")
    (saved / "config.json").write_text("{}")
    told = (
        f"{second.name} is missing; other.safetensors is extra; config.json differs; {first.name}"
    )
    with pytest.raises(CheckpointError, match=told):
        tnlm.verify(saved)


def test_a_loaded_model_has_sums_when_saved_again(saved, tmp_path):
    again = tnlm.save(tnlm.load(saved), tmp_path / "again")
    assert tnlm.verify(again)
    assert "parameters" in CliRunner().invoke(app, ["info", str(again)]).stdout


def test_reports_without_sums_are_still_read(saved):
    report = json.loads((saved / REPORT_FILE).read_text())
    del report["sha256"]
    (saved / REPORT_FILE).write_text(json.dumps(report))
    tnlm.load(saved)
    for remove in (False, True):
        if remove:
            (saved / REPORT_FILE).unlink()
        with pytest.raises(CheckpointError, match=r"has no sums .* save it again with tnlm\.save"):
            tnlm.load(saved, verify=True)


@pytest.mark.parametrize("sums", [[], 3, {"config.json": 3}, {"config.json": None}])
def test_broken_sums_are_an_error(sums, saved):
    report = json.loads((saved / REPORT_FILE).read_text()) | {"sha256": sums}
    (saved / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="broken field 'sha256'"):
        tnlm.verify(saved)


def test_sums_name_no_files_elsewhere(saved, tmp_path):
    (tmp_path / "secret").write_text("x")
    report = json.loads((saved / REPORT_FILE).read_text())
    report["sha256"]["../secret"] = "0" * 64
    (saved / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"\.\./secret is missing"):
        tnlm.verify(saved)


def test_the_command_verifies(saved):
    done = CliRunner().invoke(app, ["verify", str(saved)])
    assert done.exit_code == 0
    assert "files match their checksums" in done.stdout
    done = CliRunner().invoke(app, ["verify", str(saved), "--json"])
    assert json.loads(done.stdout) == tnlm.verify(saved)
    exchange(saved)
    done = CliRunner().invoke(app, ["verify", str(saved)])
    assert isinstance(done.exception, CheckpointError)
