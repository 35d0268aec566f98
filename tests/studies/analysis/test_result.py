from __future__ import annotations

import csv
import io
import json

import pytest
import torch

import tnlm
from tnlm.errors import CheckpointError, OptionError

IDS = torch.arange(96) % 61 + 3


@pytest.fixture(scope="module")
def found(tiny_llama):
    model = tiny_llama(num_hidden_layers=1)
    arguments = {"formats": ["low-rank", "kronecker"], "targets": ["up_proj", "o_proj"]}
    return tnlm.analyze(model, IDS, max_length=16, progress=False, **arguments)


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_json_gives_the_same_analysis_back(found):
    again = tnlm.Analysis.from_json(found.to_json())
    assert again == found
    assert again.weights[0].shape == (32, 32)


def test_rows_tell_of_weights_and_features(found):
    row = found.rows[1]
    assert row["name"] == "model.layers.0.mlp.up_proj"
    assert (row["outputs"], row["inputs"]) == (48, 32)
    features = [r.spectrum.ratio90 for r in found.features if r.name == row["name"]]
    keys = ["uncentered", "uncentered_without_top", "centered", "centered_without_top"]
    assert [row[f"features_{key}_ratio90"] for key in keys] == features
    json.dumps(found.rows, allow_nan=False)


def test_every_table_is_csv(found):
    weights = read(found.to_csv())
    assert [row["name"] for row in weights] == [row.name for row in found.weights]
    assert float(weights[0]["stable_rank"]) == found.weights[0].spectrum.stable_rank
    features = read(found.to_csv("features"))
    assert [row["centered"] for row in features[:4]] == ["false", "false", "true", "true"]
    curves = read(found.to_csv("curves"))
    assert len(curves) == len(found.curves)
    assert json.loads(curves[0]["spec"]) == dict(found.curves[0].spec)
    with pytest.raises(OptionError, match="table='weight'; did you mean 'weights'"):
        found.to_csv("weight")


def test_a_missing_kurtosis_is_an_empty_cell(tiny_llama):
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(0.5)
    found = tnlm.analyze(model, targets=["up_proj"], progress=False)
    assert found.weights[0].kurtosis is None
    assert read(found.to_csv())[0]["kurtosis"] == ""
    assert tnlm.Analysis.from_json(found.to_json()) == found


def test_the_table_is_readable(found, tiny_llama):
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["target", "shape", "stable", "effective"]
    assert lines[1].startswith("model.layers.0.self_attn.o_proj  32x32")
    assert len(lines[1].split()) == len(lines[2].split()) == 8
    bare = tnlm.analyze(tiny_llama(num_hidden_layers=1), targets=["up_proj"], progress=False)
    assert len(str(bare).splitlines()[1].split()) == 7


def test_notes_and_what_was_skipped_are_printed(tiny_llama):
    found = tnlm.analyze(
        tiny_llama(), IDS[:8], targets=["embed_tokens", "up_proj"], max_length=8, progress=False
    )
    text = str(found)
    assert text.count("note: ") == 2  # centered or not
    assert "note: model.layers.0.mlp.up_proj: only 8 inputs for 48 outputs, whose rank" in text
    assert "skipped: model.embed_tokens: features: an embedding has no input" in text


def test_damage_is_what_goes_times_stable_rank(found):
    name, rank = found.weights[0].name, found.weights[0].spectrum.stable_rank
    assert found.damage(0.75)[name] == pytest.approx(0.25 * rank)
    assert len(found.damage(0.75)) == 2
    assert found.damage({name: 0.5}) == {name: pytest.approx(0.5 * rank)}
    assert set(found.damage(1.0).values()) == {0.0}
    with pytest.raises(OptionError, match=r"keep=1.5 for .*; allowed: 0 to 1"):
        found.damage(1.5)
    with pytest.raises(OptionError, match="keep= names 'up_proj'"):
        found.damage({"up_proj": 0.5})


def test_everything_is_saved(found, tmp_path):
    folder = found.save(tmp_path / "a" / "b")
    names = {"analysis.json", "weights.csv", "features.csv", "curves.csv"}
    assert {path.name for path in folder.iterdir()} == names
    assert tnlm.Analysis.from_json((folder / "analysis.json").read_text()) == found
    assert (folder / "curves.csv").read_text() == found.to_csv("curves")
    with pytest.raises(CheckpointError, match="is not empty"):
        found.save(folder)
    found.save(folder, overwrite=True)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_save_leaves_the_old_files(found, tmp_path, monkeypatch):
    folder = found.save(tmp_path / "out")
    before = (folder / "analysis.json").read_text()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(tnlm.Analysis, "to_csv", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*no space left; nothing was changed"):
        found.save(folder, overwrite=True)
    assert (folder / "analysis.json").read_text() == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "3"])
def test_other_json_is_refused(text):
    with pytest.raises(OptionError, match="not a tnlm analysis"):
        tnlm.Analysis.from_json(text)


def test_other_versions_and_fields_are_refused(found):
    data = json.loads(found.to_json())
    with pytest.raises(OptionError, match="does not have format_version 1"):
        tnlm.Analysis.from_json(json.dumps(data | {"format_version": 2}))
    with pytest.raises(OptionError, match="not a tnlm analysis"):
        tnlm.Analysis.from_json(json.dumps(data | {"colour": "red"}))
