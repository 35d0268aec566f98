from __future__ import annotations

import pytest

from tnlm.errors import CheckpointError
from tnlm.studies.journal import Journal

ABOUT = {"model": "a", "ranks": (1, 2)}


def test_trials_are_there_when_opened_again(tmp_path):
    path = tmp_path / "new" / "trials.jsonl"
    journal = Journal(path, ABOUT)
    journal.add("a", {"loss": 1.5})
    journal.add("b", {"loss": None})
    assert Journal(path, ABOUT).rows == journal.rows == {"a": {"loss": 1.5}, "b": {"loss": None}}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_short_is_dropped_and_the_rest_stays(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, ABOUT)
    journal.add("a", {"loss": 1.5})
    journal.add("b", {"loss": 2.5})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, ABOUT)
    assert again.rows == {"a": {"loss": 1.5}}
    again.add("b", {"loss": 3.5})
    assert Journal(path, ABOUT).rows == {"a": {"loss": 1.5}, "b": {"loss": 3.5}}


def test_a_header_that_was_cut_short_starts_anew(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"format_ver')
    assert Journal(path, ABOUT).rows == {}
    assert Journal(path, ABOUT).rows == {}


def test_other_trials_are_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    Journal(path, ABOUT).add("a", {})
    with pytest.raises(CheckpointError, match="journal of other trials, which differ in model"):
        Journal(path, {**ABOUT, "model": "b"})
    path.write_text("a, b\n")
    with pytest.raises(CheckpointError, match="is not a journal of trials"):
        Journal(path, ABOUT)
    path.write_text('{"format_version": 0, "about": {}}\n')
    with pytest.raises(CheckpointError, match="differ in format_version"):
        Journal(path, ABOUT)


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "trials.jsonl"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            Journal(path, ABOUT)
