from __future__ import annotations

import json

import pytest
from datasets import Dataset

from tnlm.calibration.data import token_batches
from tnlm.calibration.labelled import labelled
from tnlm.errors import CalibrationError

ROWS = [{"text": "word0 word1 word2", "label": 1}, {"text": "word5", "label": 0}]


def test_rows_files_and_datasets_give_the_same(word_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    expected = [{"input_ids": [3, 4, 5], "labels": 1}, {"input_ids": [8], "labels": 0}]
    for data in (ROWS, path, str(path), Dataset.from_list(ROWS)):
        assert labelled(data, word_tokenizer) == expected
    [batch] = token_batches(expected, batch_size=2)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]


def test_columns_can_have_other_names_and_texts_are_cut(word_tokenizer):
    rows = [{"sentence": "word0 word1 word2", "class": 2}]
    found = labelled(rows, word_tokenizer, text="sentence", label="class", max_length=2)
    assert found == [{"input_ids": [3, 4], "labels": 2}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no rows"),
        ([ROWS[0], {"text": "word1"}], "row 1 has no column 'label', only 'text'"),
        (["word1"], "row 0 is a str; give dicts"),
        ([{"text": "word1", "label": "good"}], "row 0: label='good', but classes are integers"),
        ([{"text": "word1", "label": -1}], "row 0: label=-1"),
        ([{"text": 3, "label": 1}], "row 0: 'text' is a int, not a string"),
        ("no such file.jsonl", "no such file.jsonl: no such file"),
    ],
)
def test_what_is_no_labelled_text_is_named(data, message, word_tokenizer):
    with pytest.raises(CalibrationError, match=message):
        labelled(data, word_tokenizer)


def test_a_broken_line_is_named(word_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(CalibrationError, match=r"rows.jsonl:2: not valid JSON"):
        labelled(path, word_tokenizer)
