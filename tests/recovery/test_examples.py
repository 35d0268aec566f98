import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tnlm.errors import OptionError, TrainingError
from tnlm.recovery.examples import batches, collate, training_set


@pytest.fixture(scope="module")
def masking_tokenizer(word_tokenizer):
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.mask_token = "word60"
    return tokenizer


def ids_of(examples):
    return [item["input_ids"].tolist() for item in examples.items]


ROWS = [{"text": "word0 word1", "label": 1}, {"text": "word2", "label": 0}]


def test_texts_files_ids_and_datasets_give_the_same_windows(tmp_path, word_tokenizer, word_text):
    text = word_text(20)
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(text)
    lines.write_text(json.dumps({"text": text}))
    ids = torch.tensor(word_tokenizer(text, verbose=False)["input_ids"])
    dataset = datasets.Dataset.from_dict({"text": [text]})
    kinds = [[text], plain, str(lines), ids, ids.tolist(), dataset, [{"text": text}]]
    sets = [training_set(kind, word_tokenizer, max_length=8) for kind in kinds]
    assert all(ids_of(one) == ids_of(sets[0]) for one in sets)
    assert len(sets[0]) == 2
    assert not sets[0].classes


def test_every_token_but_the_first_is_predicted():
    item = training_set([[5, 6, 7]])[0]
    assert item["labels"].tolist() == [-100, 6, 7]


def test_rows_with_labels_are_classes_of_any_source(tmp_path, word_tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    for data in (ROWS, file, datasets.Dataset.from_list(ROWS)):
        examples = training_set(data, word_tokenizer)
        assert examples.classes
        assert ids_of(examples) == [[3, 4], [5]]
        assert [int(item["labels"]) for item in examples.items] == [1, 0]


def test_rows_may_hold_ids_and_name_their_columns():
    rows = [{"input_ids": [4, 5, 6], "class": 2}]
    item = training_set(rows, label="class", max_length=2)[0]
    assert (item["input_ids"].tolist(), int(item["labels"])) == ([4, 5], 2)


def test_classes_keep_the_special_tokens(word_tokenizer):
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    assert ids_of(training_set(ROWS, tokenizer)) == [[2, 3, 4], [2, 5]]


def test_label_none_reads_rows_as_text(word_tokenizer):
    examples = training_set(ROWS, word_tokenizer, label=None, max_length=2)
    assert not examples.classes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"text": "word1"}], r"row 2 has no column 'label', only 'text'"),
        ([ROWS[0], {"label": 0, "sentence": "word1"}], r"row 1 has no column 'text'.*text="),
        ([ROWS[0], {"text": "word1", "label": 0.5}], r"row 1: label=0.5"),
        ([ROWS[0], {"text": "word1", "label": True}], r"row 1: label=True"),
        ([ROWS[0], {"text": "word1", "label": -1}], r"row 1: label=-1"),
        ([ROWS[0], {"text": 3, "label": 1}], r"row 1: 'text' is a int"),
        ([ROWS[0], {"text": "", "label": 1}], r"row 1 has no tokens"),
        ([ROWS[0], "word1"], r"row 1 is a str"),
        ([{"sentence": "word1"}], r"row 0 has no column 'text', only 'sentence'"),
        ([], r"has no tokens"),
        ([""], r"has no tokens"),
        (3, r"is a int"),
    ],
)
def test_an_error_names_the_item(rows, message, word_tokenizer):
    with pytest.raises(TrainingError, match=message):
        training_set(rows, word_tokenizer)


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2: not valid JSON"):
        training_set(file)
    file.write_text("[1]")
    with pytest.raises(TrainingError, match=r":1: not a JSON object"):
        training_set(file)
    with pytest.raises(TrainingError, match="no such file"):
        training_set(tmp_path / "none.jsonl")


def test_text_needs_a_tokenizer():
    for data in (ROWS, ["word1"]):
        with pytest.raises(TrainingError, match="tokenizer="):
            training_set(data)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 3))
def test_no_more_tokens_than_asked_for(lengths, most, seed):
    data = [list(range(1, length + 1)) for length in lengths]
    drawn = training_set(data, max_tokens=most, seed=seed)
    total = sum(len(row) for row in ids_of(drawn))
    assert total <= most or len(drawn) == 1
    assert ids_of(drawn) == ids_of(training_set(data, max_tokens=most, seed=seed))


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_tokens_are_a_positive_integer(most):
    with pytest.raises(OptionError, match="tokens="):
        training_set([[1, 2]], max_tokens=most)


def test_a_share_of_tokens_is_hidden(masking_tokenizer):
    data = torch.arange(400) % 50 + 3
    arguments = {"max_length": 40, "masked": True}
    examples = training_set(data, masking_tokenizer, **arguments)
    for item, start in zip(examples.items, range(0, 400, 40), strict=True):
        hidden = item["labels"] != -100
        assert int(hidden.sum()) == 6
        assert item["input_ids"][hidden].tolist() == [masking_tokenizer.mask_token_id] * 6
        whole = torch.where(hidden, item["labels"], item["input_ids"])
        assert torch.equal(whole, data[start : start + 40])
    again, other = (training_set(data, masking_tokenizer, **arguments, seed=s) for s in (0, 1))
    assert ids_of(examples) == ids_of(again) != ids_of(other)


def test_even_a_short_sequence_has_something_to_predict(masking_tokenizer):
    item = training_set([[5, 6]], masking_tokenizer, masked=True)[0]
    assert int((item["labels"] != -100).sum()) == 1


def test_hiding_needs_a_mask_token(word_tokenizer):
    for tokenizer in (None, word_tokenizer):
        with pytest.raises(TrainingError, match="mask token"):
            training_set([[5, 6]], tokenizer, masked=True)


def test_batches_are_padded_on_the_right():
    one, two = batches(training_set([[5, 6, 7], [8, 9], [3]]), 2, pad=1)
    assert one["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert one["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert one["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert two["input_ids"].tolist() == [[3]]


def test_classes_are_stacked():
    batch = collate(training_set([{"input_ids": [4, 5], "label": 2}]).items)
    assert batch["labels"].tolist() == [2]


def test_batch_size_is_positive():
    with pytest.raises(OptionError, match="batch_size=0"):
        batches(training_set([[5]]), 0)
