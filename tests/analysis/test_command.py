from __future__ import annotations

import pytest

import tnlm
from tnlm.analysis.command import analyze_to
from tnlm.errors import CheckpointError


def test_a_directory_is_analyzed_into_another(tmp_path, tiny_llama, word_tokenizer, word_text):
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(word_text(400))
    arguments = {"formats": ["low-rank"], "max_length": 16, "targets": ["up_proj"]}
    found = analyze_to(
        tmp_path / "model",
        tmp_path / "out",
        calibration=tmp_path / "text.txt",
        progress=False,
        **arguments,
    )
    assert tnlm.Analysis.from_json((tmp_path / "out" / "analysis.json").read_text()) == found
    assert len(found.features) == 4
    assert found.protocol["tokens"] == 256
    assert found.curves


def test_a_full_directory_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        analyze_to("./no/such/model", tmp_path)
