from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tnlm.calibration.data import count_tokens, fingerprint, read_text, token_batches
from tnlm.errors import CalibrationError, OptionError


def ids_of(batches):
    return [row for batch in batches for row in batch["input_ids"].tolist()]


class Stream(torch.utils.data.IterableDataset):
    """Endless rows of five, which count how far they were read."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield torch.full((5,), self.read)


def test_texts_are_joined_tokenised_once_and_cut_into_full_windows(word_tokenizer):
    batches = token_batches(["word0 word1 word2", "word3 word4"], word_tokenizer, max_length=2)
    assert ids_of(batches) == [[3, 4], [5, 6]]
    assert all(b["input_ids"].dtype == b["attention_mask"].dtype == torch.int64 for b in batches)
    assert count_tokens(batches) == 4


def test_no_special_tokens_and_no_length_warning(word_tokenizer, word_text, caplog, monkeypatch):
    # transformers keeps its records from the root logger, and its own handler from the capture.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    word_tokenizer.deprecation_warnings = {}
    [row] = ids_of(token_batches([word_text(40)], word_tokenizer, max_length=40))
    assert min(row) >= 3
    assert not caplog.records


@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_text_file_and_jsonl_give_what_the_list_gives(as_type, word_tokenizer, word_text, tmp_path):
    texts = [word_text(9, seed=seed) for seed in range(4)]
    plain, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text("\n\n".join(texts))
    lines.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    expected = fingerprint(token_batches(texts, word_tokenizer, max_length=8))
    for path in (plain, lines):
        batches = token_batches(as_type(path), word_tokenizer, max_length=8)
        assert fingerprint(batches) == expected


def test_jsonl_keeps_unicode_line_separators_inside_a_text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert read_text(path) == "a\u2028b"


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, tuple])
def test_one_dimensional_ids_are_cut_into_windows(make):
    assert ids_of(token_batches(make(list(range(7))), max_length=3)) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("make", [torch.tensor, np.array, list])
def test_two_dimensional_ids_keep_their_rows(make):
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    batches = token_batches(make(rows), max_length=3, batch_size=2)
    assert ids_of(batches) == [[1, 2, 3], [5, 6, 7], [9, 9, 9]]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]


def test_rows_of_unequal_length_are_padded_and_masked():
    [batch] = token_batches([torch.tensor([5, 6, 7]), [8], torch.tensor([[9, 9]])], batch_size=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert count_tokens([batch]) == 6


def test_masks_are_kept_and_padding_at_both_ends_goes():
    batch = {
        "input_ids": torch.tensor([[0, 0, 1, 2, 3, 4], [5, 6, 7, 0, 0, 0], [0] * 6]),
        "attention_mask": torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6]).bool(),
    }
    [out] = token_batches([batch], max_length=3, batch_size=8)
    assert out["input_ids"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert out["attention_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]


def test_what_a_tokenizer_returns_is_accepted(word_tokenizer):
    encoded = word_tokenizer(["word0 word1", "word2"], padding=True, return_tensors="pt")
    assert ids_of(token_batches(encoded)) == [[3, 4], [5]]


def test_dataloader_of_dicts_tensors_and_tensor_datasets():
    ids = torch.arange(12).reshape(4, 3)
    rows = [{"input_ids": row, "attention_mask": torch.ones(3)} for row in ids]
    for data in (rows, ids, TensorDataset(ids)):
        batches = token_batches(DataLoader(data, batch_size=2), num_samples=3)
        assert ids_of(batches) == ids[:3].tolist()


def test_dataloader_is_read_no_further_than_needed():
    stream = Stream()
    assert len(token_batches(DataLoader(stream, batch_size=2), num_samples=3)) == 3
    assert stream.read == 4


def test_dataset_with_text_or_input_ids(word_tokenizer):
    text = Dataset.from_dict({"text": ["word0 word1", "word2 word3"]})
    assert ids_of(token_batches(text, word_tokenizer, max_length=2)) == [[3, 4], [5, 6]]
    columns = {"input_ids": [[7, 8, 0], [], [9]], "attention_mask": [[1, 1, 0], [], [1]]}
    ids = Dataset.from_dict(columns | {"text": ["", "", ""]})
    assert ids_of(token_batches(ids)) == [[7, 8], [9]]
    assert ids_of(token_batches(ids.with_format("torch"))) == [[7, 8], [9]]


def test_dataset_sample_is_drawn_by_seed():
    data = Dataset.from_dict({"input_ids": [[i] for i in range(50)]})
    first, again, other = (ids_of(token_batches(data, num_samples=5, seed=s)) for s in (0, 0, 1))
    assert first == again == sorted(first)
    assert first != other


@given(
    tokens=st.integers(1, 200),
    max_length=st.integers(1, 20),
    num_samples=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_windows_are_distinct_ordered_and_as_many_as_there_can_be(
    tokens, max_length, num_samples, batch_size, seed
):
    ids = torch.arange(tokens)
    options = {"max_length": max_length, "num_samples": num_samples, "seed": seed}
    if tokens < max_length:
        with pytest.raises(CalibrationError, match=f"{tokens} tokens"):
            token_batches(ids, batch_size=batch_size, **options)
        return
    batches = token_batches(ids, batch_size=batch_size, **options)
    starts = [row[0] for row in ids_of(batches)]
    assert starts == sorted(set(starts))
    assert all(row == list(range(row[0], row[0] + max_length)) for row in ids_of(batches))
    assert all(start % max_length == 0 for start in starts)
    assert len(starts) == min(num_samples, tokens // max_length)
    assert all(len(batch["input_ids"]) <= batch_size for batch in batches)
    assert fingerprint(batches) == fingerprint(token_batches(ids, batch_size=batch_size, **options))
    assert fingerprint(token_batches(batches, batch_size=batch_size)) == fingerprint(batches)


def test_fingerprint_sees_ids_masks_and_shapes():
    variants = [
        token_batches(torch.tensor([1, 2, 3, 4]), max_length=4),
        token_batches(torch.tensor([1, 2, 3, 5]), max_length=4),
        token_batches(torch.tensor([1, 2, 3, 4]), max_length=2),
        token_batches(torch.tensor([1, 2, 3, 4]), max_length=2, batch_size=2),
        token_batches(
            {"input_ids": torch.tensor([1, 2, 3, 4]), "attention_mask": [1, 0, 1, 1]}, max_length=4
        ),
    ]
    assert len({fingerprint(batches) for batches in variants}) == len(variants)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no tokens"),
        ([""], "no tokens"),
        (["  \n "], "no tokens"),
        (torch.empty(0, dtype=torch.int64), "no tokens"),
        (torch.empty(0, 5, dtype=torch.int64), "no tokens"),
        ([[], []], "no tokens"),
        (["word0 word1"], "2 tokens, fewer than one window of max_length=512; use max_length<=2"),
        ("no-such-file.txt", r"put it in a list: \[text\]"),
        ("no-such-folder/text", r"put it in a list: \[text\]"),
        ("my notes.txt", "is not an existing file: no such file"),
        ("a long text. " * 100, "300 tokens, fewer than one window of max_length=512"),
        (["word0", 3], "mixes strings with a int"),
        (None, "is a NoneType"),
        (7, "is a int"),
        ([object()], "has a object"),
        ([[1, 2], "x"], "mixes strings with a list"),
        (torch.tensor([1.0, float("nan")]), "must be integers, got torch.float32"),
        ([[0.5, 1.5]], "must be integers"),
        ([True, False], "must be integers, got torch.bool"),
        (torch.tensor([[3, -100]]), "must not be negative, got -100"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"shape \(2, 2, 2\)"),
        ([{"labels": [1]}], r"keys \['labels'\]"),
        ({"input_ids": [[1, 2]], "attention_mask": [1, 1]}, "mask of shape"),
        (Dataset.from_dict({"story": ["a"]}), r"columns \['story'\]"),
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), r"keys \['train'\]"),
        (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "fewer than one window"),
    ],
)
def test_bad_data_is_a_clear_error(data, message, word_tokenizer):
    with pytest.raises(CalibrationError, match=message):
        token_batches(data, word_tokenizer)


def test_text_without_tokenizer():
    with pytest.raises(CalibrationError, match="tokenizer="):
        token_batches(["some text"])


@pytest.mark.parametrize("option", ["num_samples", "max_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_options(option, value):
    with pytest.raises(OptionError, match=f"{option}={value}"):
        token_batches([1, 2, 3], **{option: value})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2: no string 'text'"),
        ("a.jsonl", b'{"text": "x"}\n\nnot json\n', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'["x"]\n', "not a JSON object"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(path)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(CalibrationError, match="not a readable"):
        read_text(tmp_path)
    with pytest.raises(CalibrationError, match="not an existing file"):
        token_batches(tmp_path)
