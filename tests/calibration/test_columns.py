"""Rows with named columns: texts, pairs and conversations, in lists, files and streams."""

from __future__ import annotations

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset

import tnlm
from tnlm.calibration.columns import conversation
from tnlm.calibration.data import fingerprint, token_batches
from tnlm.errors import CalibrationError, OptionError, TrainingError
from tnlm.recovery.examples import training_set

TEXTS = [f"word{i} word{i + 1} word{i + 2}" for i in range(0, 57, 3)]
ROWS = [{"content": text, "label": index} for index, text in enumerate(TEXTS)]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "word60"}]}
    for text in TEXTS
]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
CUT = {"max_length": 4, "num_samples": 5}


def ids_of(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def jsonl(path, rows):
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def chat_tokenizer(word_tokenizer):
    before = word_tokenizer.chat_template
    word_tokenizer.chat_template = TEMPLATE
    yield word_tokenizer
    word_tokenizer.chat_template = before


def forms(rows, folder):
    return {
        "list": rows,
        "jsonl": str(jsonl(folder / "rows.jsonl", rows)),
        "gz": jsonl(folder / "rows.jsonl.gz", rows),
        "parquet": str(parquet(folder / "rows.parquet", rows)),
        "dataset": Dataset.from_list(rows),
    }


def test_named_columns_are_read_alike_from_all_forms(tmp_path, word_tokenizer):
    found = {
        name: fingerprint(token_batches(data, word_tokenizer, column="content", **CUT))
        for name, data in forms(ROWS, tmp_path).items()
    }
    assert len(set(found.values())) == 1, found
    first = token_batches(ROWS, word_tokenizer, column="content", **CUT)
    assert ids_of(first).shape == (5, 4)
    other = token_batches(ROWS, word_tokenizer, column="content", seed=1, **CUT)
    assert fingerprint(first) != fingerprint(other)


def test_texts_in_lists_and_parquet_need_no_name(tmp_path, word_tokenizer):
    rows = [{"text": text} for text in TEXTS]
    for data in (rows, parquet(tmp_path / "a.parquet", rows)):
        assert len(token_batches(data, word_tokenizer, **CUT)) == 5


def test_packed_texts_give_what_plain_ones_give(tmp_path, word_tokenizer):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("\n\n".join(TEXTS).encode()))
    expected = token_batches(TEXTS, word_tokenizer, max_length=4)
    assert fingerprint(token_batches(path, word_tokenizer, max_length=4)) == fingerprint(expected)


def test_conversations_go_through_the_chat_template(tmp_path, chat_tokenizer):
    whole = token_batches(CHATS, chat_tokenizer, max_length=7, num_samples=99)
    for row in ids_of(whole):  # user, three words, assistant, word60: two are unknown
        assert sorted(row.tolist()).count(1) >= 2
    for data in forms(CHATS, tmp_path).values():
        assert fingerprint(token_batches(data, chat_tokenizer, **CUT)) == fingerprint(
            token_batches(CHATS, chat_tokenizer, **CUT)
        )
    started = token_batches(CHATS, chat_tokenizer, bos=True, **CUT)
    assert ids_of(started)[:, 0].unique().tolist() == [2]


def test_a_conversation_without_a_template_says_what_to_do(word_tokenizer, chat_tokenizer):
    chat_tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"no chat template; set tokenizer\.chat_template"):
        token_batches(CHATS, word_tokenizer, **CUT)
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"not accept the messages .* must alternate"):
        token_batches(CHATS, word_tokenizer, **CUT)
    chat_tokenizer.chat_template = TEMPLATE
    for wrong in ("hello", [], ["hello"], [{"content": "x"}]):
        with pytest.raises(CalibrationError, match="give a list of"):
            conversation(wrong, chat_tokenizer)


class Counted:
    """Rows that count how many were read."""

    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __call__(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_of_a_stream_no_more_is_read_than_is_needed(word_tokenizer):
    counted = Counted([{"text": f"word{i % 60} word1"} for i in range(5000)])
    stream = IterableDataset.from_generator(counted)
    first = token_batches(stream, word_tokenizer, **CUT)
    assert ids_of(first).shape == (5, 4)
    assert counted.read < 1100  # the buffer
    assert fingerprint(first) == fingerprint(token_batches(stream, word_tokenizer, **CUT))
    assert fingerprint(first) != fingerprint(token_batches(stream, word_tokenizer, seed=1, **CUT))


def test_streams_of_ids_and_pairs(make_tiny, word_tokenizer):
    ids = Dataset.from_list([{"input_ids": [3, 4, i]} for i in range(20)]).to_iterable_dataset()
    assert len(token_batches(ids, num_samples=4)) == 4
    pairs = Dataset.from_list([{"a": text, "b": "word1"} for text in TEXTS]).to_iterable_dataset()
    options = {"column": ("a", "b"), "model": make_tiny("t5"), "num_samples": 3}
    batches = token_batches(pairs, word_tokenizer, **options)
    assert [batch["labels"].tolist() for batch in batches] == [[[4]]] * 3


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (ROWS, {"column": "body"}, CalibrationError, r"columns \['content', 'label'\]"),
        (ROWS, {"column": "label"}, CalibrationError, "holds a int, not a string"),
        (ROWS, {"column": 3}, OptionError, "column=3; allowed"),
        (ROWS, {"column": ("a", "b", "c")}, OptionError, "two of them, for pairs"),
        (["a text"], {"column": "text"}, OptionError, "rows with named columns"),
        ([*ROWS[:1], {}], {"column": "content", "num_samples": 50}, CalibrationError, "row of the"),
        (Dataset.from_list(ROWS), {}, CalibrationError, "the name of its column of texts"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), {}, CalibrationError, "'messages'"),
    ],
)
def test_columns_that_are_not_there_are_named(data, options, error, message, word_tokenizer):
    with pytest.raises(error, match=message):
        token_batches(data, word_tokenizer, **{**CUT, **options})


def test_text_in_columns_needs_a_tokenizer():
    with pytest.raises(CalibrationError, match="tokenizer="):
        token_batches([{"text": "a"}])


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch, word_tokenizer):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        token_batches(tmp_path / "bad.parquet", word_tokenizer)
    good = parquet(tmp_path / "good.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match=r"pip install 'tnlm\[data\]'"):
        token_batches(good, word_tokenizer, column="content")


def test_compress_reads_a_named_column(tiny_llama, word_tokenizer):
    cut = {"num_samples": 4, "max_length": 8}
    data = tnlm.Calibration(ROWS, word_tokenizer, column="content", **cut)
    model = tnlm.compress(tiny_llama(), "svd-llm", rank=4, calibration=data, progress=False)
    flat = {"calibration": ROWS, "tokenizer": word_tokenizer, "column": "content", **cut}
    other = tnlm.compress(tiny_llama(), "svd-llm", rank=4, progress=False, **flat)
    assert tnlm.report(model).fingerprint == tnlm.report(other).fingerprint


def test_training_takes_conversations_parquet_and_streams(tiny_llama, chat_tokenizer, tmp_path):
    options = {"tokenizer": chat_tokenizer, "max_length": 8, "progress": False}
    for data in (CHATS, parquet(tmp_path / "chats.parquet", CHATS)):
        tnlm.finetune(tiny_llama(num_hidden_layers=1), data, tokens=32, **options)
    stream = Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset()
    tnlm.finetune(tiny_llama(num_hidden_layers=1), stream, tokens=32, **options)
    with pytest.raises(TrainingError, match="may be endless"):
        training_set(stream, chat_tokenizer, max_length=8)
