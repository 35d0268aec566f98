from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import tnlm
from tnlm.calibration import sources
from tnlm.calibration.data import fingerprint, text_of, token_batches
from tnlm.calibration.files import file_meant
from tnlm.calibration.sources import File, Memory, drawn_windows, first_ids, open_source
from tnlm.calibration.text import read_text, tokenize
from tnlm.errors import CalibrationError, EvaluationError, TnlmError, TrainingError
from tnlm.recovery.examples import training_set

MISSING = ["missing.txt", "my data/missing file.jsonl", "./missing", "~/missing", "missing"]
PATHS = [*MISSING, Path("missing.txt"), Path("missing text without suffix")]
TEXTS = [
    "One sentence, as it is.",
    "two\nlines.txt",
    "",
    " ",
    "word " * 2000 + "end.txt",
    "很" * 300,
    "half/way between words",
]


@pytest.fixture
def small(monkeypatch):
    """Let texts be long early."""
    monkeypatch.setattr(sources, "WHOLE", 2000)
    monkeypatch.setattr("tnlm.calibration.windows.WHOLE", 2000)
    monkeypatch.setattr(sources, "CHUNK", 256)


@pytest.fixture
def paragraphs(word_text):
    return [word_text(10 + 7 * seed % 23, seed=seed) for seed in range(200)]


@pytest.fixture
def files(paragraphs, tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.JSONL"
    plain.write_text("\n\n".join(paragraphs))
    lines.write_text("\n".join(json.dumps({"text": each}) for each in paragraphs) + "\n")
    return plain, lines


@pytest.mark.parametrize("name", PATHS, ids=str)
def test_a_name_without_a_file_is_refused_by_every_function(name, tiny_llama, word_tokenizer):
    model, words = tiny_llama(), {"tokenizer": word_tokenizer, "progress": False}
    small = {**words, "max_length": 2}
    calls = [
        lambda: tnlm.compress(model, "svd-llm", calibration=name, rank=4, **small),
        lambda: tnlm.compress(model, "svd", rank=4, recover="finetune", training=name, **small),
        lambda: tnlm.plan(model, "svd-llm", calibration=name, rank=4, **small),
        lambda: tnlm.analyze(model, name, **small),
        lambda: tnlm.finetune(model, name, **small),
        lambda: tnlm.distill(model, tiny_llama(), name, **small),
        lambda: tnlm.perplexity(model, name, word_tokenizer, window=2),
        lambda: tnlm.evaluate(model, ["perplexity"], data={"perplexity": name}, window=2, **words),
        lambda: tnlm.rank_search(
            model, "perplexity", search=name, report=name, growth=1.1, scheme="svd", **small
        ),
        lambda: tnlm.prune(model, name, progress=False),
    ]
    for call in calls[:-1]:
        with pytest.raises(TnlmError, match="is not an existing file: no such file"):
            call()
    with pytest.raises(TnlmError):
        calls[-1]()


@pytest.mark.parametrize("text", TEXTS)
def test_a_string_that_can_be_no_name_is_a_text_everywhere(text):
    assert file_meant(text) is None
    assert text_of(text).part(0, len(text)) == text


@pytest.mark.parametrize("text", [None, 7, b"bytes", {"a": 1}, [1, 2]])
def test_perplexity_is_of_text(text, tiny_llama, word_tokenizer):
    with pytest.raises(EvaluationError, match="needs a text, not a"):
        tnlm.perplexity(tiny_llama(), text, word_tokenizer, window=4)


def test_a_folder_is_no_text(tmp_path, monkeypatch, tiny_llama, word_tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for place in (tmp_path, str(tmp_path), "folder"):
        with pytest.raises(EvaluationError, match="it is a directory"):
            tnlm.perplexity(tiny_llama(), place, word_tokenizer, window=4)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_marks_packing_and_line_ends_make_no_difference(encoding, pack, newline, tmp_path):
    rows = "\n".join([json.dumps({"text": "eins"}), "", json.dumps({"text": "zwei ü"}), ""])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pack(rows.replace("\n", newline).encode(encoding)))
    assert read_text(path) == "eins\n\nzwei ü"
    path = tmp_path / "text.txt"
    path.write_bytes(pack(f"eins{newline}zwei ü".encode(encoding)))
    assert read_text(path) == "eins\nzwei ü"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16-le"), "null characters"),
        ("a.gz", gzip.compress(b"text " * 99, mtime=0)[:20], "not a readable"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:2: not valid"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"story": "b"}\n', "a.jsonl:2: no string 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "unpaired surrogate"),
        ("a.jsonl", b"\n \n", "has no tokens"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path, word_tokenizer):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        token_batches(path, word_tokenizer, max_length=4)
    with pytest.raises(TrainingError):
        training_set(path, word_tokenizer, max_length=4)


def test_up_to_the_limit_windows_are_those_of_the_whole(files, paragraphs, word_tokenizer):
    whole = token_batches(paragraphs, word_tokenizer, max_length=8, num_samples=20, seed=3)
    ids = tokenize("\n\n".join(paragraphs), word_tokenizer)
    expected = token_batches(ids, max_length=8, num_samples=20, seed=3)
    assert fingerprint(whole) == fingerprint(expected)
    for path in files:
        found = token_batches(path, word_tokenizer, max_length=8, num_samples=20, seed=3)
        assert fingerprint(found) == fingerprint(expected)


@pytest.mark.parametrize("kind", ["plain", "lines", "memory"])
def test_chunks_put_together_are_the_text(kind, files, paragraphs, small):
    text = "\n\n".join(paragraphs)
    plain, lines = files
    source = {"plain": File(plain), "lines": File(lines), "memory": Memory(text)}[kind]
    cuts = [*range(0, source.size, 97), source.size]
    parts = [source.part(a, b) for a, b in pairwise(cuts)]
    if kind == "lines":
        assert [p for part in parts if part for p in part.split("\n\n")] == paragraphs
    else:
        assert "".join(parts) == text
        assert all(part.endswith("\n\n") for part in list(filter(None, parts))[:-1])


@pytest.mark.parametrize("text", ["ü" * 3000, "a\r\nb " * 900, "日本語 " * 700, "x" * 3000])
def test_texts_without_paragraphs_are_cut_between_words_or_characters(text, tmp_path, small):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for source in (File(path), Memory(text.replace("\r\n", "\n"))):
        cuts = [*range(0, source.size, 101), source.size]
        parts = [source.part(a, b) for a, b in pairwise(cuts)]
        assert "".join(parts) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("number", [0, 1])
def test_windows_of_a_long_file_are_its_own_and_repeat(number, files, word_tokenizer, small):
    path, options = files[number], {"max_length": 8, "num_samples": 20}
    assert isinstance(open_source(path), File)
    first, again, other = (
        token_batches(path, word_tokenizer, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    whole = " ".join(map(str, tokenize(read_text(path), word_tokenizer).tolist()))
    rows = [" ".join(map(str, batch["input_ids"][0].tolist())) for batch in first]
    places = [whole.index(row) for row in rows]
    assert len(rows) == 20
    assert places == sorted(places)
    assert places[-1] - places[0] > len(whole) // 2  # they are spread over the file


def test_a_long_text_gives_what_the_long_file_gives(files, paragraphs, word_tokenizer, small):
    options = {"max_length": 8, "num_samples": 9}
    found = token_batches(files[0], word_tokenizer, **options)
    assert fingerprint(found) == fingerprint(token_batches(paragraphs, word_tokenizer, **options))


def test_all_windows_are_found_and_few_bytes_are_read_for_few(
    files, word_tokenizer, small, monkeypatch
):
    source, read = File(files[0]), []
    part = source.part
    monkeypatch.setattr(source, "part", lambda a, b: read.append(b - a) or part(a, b))
    few = drawn_windows(source, word_tokenizer, 8, 3, seed=0)
    assert len(few) == 3
    assert sum(read) <= 3 * 256
    every = drawn_windows(source, word_tokenizer, 8, 10**9, seed=0)
    count = len(tokenize(read_text(files[0]), word_tokenizer))
    assert 0.7 * count < 8 * len(every) <= count


def test_a_broken_line_deep_in_a_long_file_is_numbered(files, word_tokenizer, small):
    lines = files[1].read_text().split("\n")
    lines[150] = '{"text": 3}'
    files[1].write_text("\n".join(lines))
    with pytest.raises(CalibrationError, match=r"a\.JSONL:151: no string 'text'"):
        token_batches(files[1], word_tokenizer, max_length=8, num_samples=10**6)


def test_no_window_fits_in_a_chunk_is_said(tmp_path, word_tokenizer, small):
    path = tmp_path / "a.txt"
    path.write_text("word1" * 2000)
    with pytest.raises(CalibrationError, match="no part of the calibration text has a window"):
        token_batches(path, word_tokenizer, max_length=8)


@pytest.mark.parametrize("count", [1, 40, 10**6])
def test_the_first_ids_are_those_of_the_whole(count, files, word_tokenizer, small):
    for path in files:
        found = first_ids(File(path), word_tokenizer, count)
        assert torch.equal(found, tokenize(read_text(path), word_tokenizer)[:count])


def test_perplexity_reads_no_further_than_its_windows(
    files, paragraphs, tiny_llama, word_tokenizer, small
):
    model, options = tiny_llama(), {"window": 8, "windows": 3}
    expected = tnlm.perplexity(model, paragraphs[:4], word_tokenizer, **options)
    with files[0].open("ab") as file:
        file.write(b"\n\n" + b"\xff" * 5000)  # no text, and never read
    assert tnlm.perplexity(model, files[0], word_tokenizer, **options) == expected


def test_training_reads_no_more_of_a_long_file_than_it_trains_on(
    files, word_tokenizer, small, monkeypatch
):
    read = []
    part = File.part
    monkeypatch.setattr(File, "part", lambda s, a, b: read.append(b - a) or part(s, a, b))
    for path in files:
        read.clear()
        found = tnlm.recovery.examples.training_set(
            path, word_tokenizer, max_length=8, max_tokens=40, label=None
        )
        assert sum(len(item["input_ids"]) for item in found.items) == 40
        assert sum(read) <= 6 * 256


@pytest.mark.parametrize("ids", [torch.arange(9, device="meta"), torch.eye(3).long().to_sparse()])
def test_ids_without_plain_data_are_refused(ids):
    with pytest.raises(CalibrationError, match="dense tensor"):
        token_batches(ids, max_length=2)


def test_ids_of_any_integer_type_are_read():
    [batch] = token_batches(np.arange(4, dtype=np.uint64), max_length=4)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3]]


def test_what_is_no_file_is_called_by_its_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(CalibrationError, match="a pipe or a device"):
            token_batches(path)


def test_a_long_line_is_looked_through_a_few_times_only(tmp_path, small, word_tokenizer):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": "word1 word2 " * 4000}))
    source = File(path)
    assert len(drawn_windows(source, word_tokenizer, 16, 4, 0)) == 4
    assert len(source._long) < 15  # of 188 chunks
