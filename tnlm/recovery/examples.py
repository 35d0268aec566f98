"""Training data: converts texts, ids or labelled rows to examples, and examples to batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tnlm.calibration.columns import MESSAGES, conversation
from tnlm.calibration.data import Batch, token_batches
from tnlm.calibration.files import file_meant, is_lines
from tnlm.calibration.inputs import IGNORED
from tnlm.calibration.rows import Rows, check_rows, class_at, read_rows, text_at
from tnlm.calibration.sources import is_long
from tnlm.calibration.tables import is_parquet, is_streamed, open_table
from tnlm.calibration.text import AUTO
from tnlm.errors import CalibrationError, OptionError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = 0.15
"""Fraction of the tokens that a masked language model must predict, as in BERT."""

Example = dict[str, Tensor]
"""``input_ids`` ``(length,)``, and ``labels``: one per token, or one class ``()``."""


class Examples(Dataset[Example]):
    """Training examples in memory.

    Args:
        items: the examples.
        classes: whether each has one class; otherwise each token has a label.
    """

    def __init__(self, items: Sequence[Example], *, classes: bool) -> None:
        """Store the items; see the class for the arguments."""
        self.items = items
        self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


def training_set(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int = 512,
    text: str = "text",
    label: str | None = "label",
    masked: bool = False,
    max_tokens: int | None = None,
    seed: int = 0,
    bos: bool | str = AUTO,
) -> Examples:
    """Convert data of any accepted kind to training examples.

    Rows with a ``label`` column are examples of classes: each text is tokenised separately, with
    special tokens, and truncated to ``max_length``. Everything else is text or ids for a language
    model, and is cut into sequences by :func:`tnlm.calibration.data.token_batches`.

    Args:
        data: data for ``token_batches``; or rows, as a list of dicts, a ``.jsonl`` file or a
            ``datasets.Dataset``.
        tokenizer: needed for text, and for ``masked``.
        max_length: tokens per window of text, and most tokens per row.
        text: name of the rows' text column; rows may have ``input_ids`` instead.
        label: name of the class column; None to read rows as text only.
        masked: hide 15 % of the tokens and predict these, instead of every next token.
        max_tokens: draw random sequences with at most this many tokens in total (but at least one
            sequence); None for all.
        seed: chooses the sequences and the hidden tokens.
        bos: whether a window of text starts with BOS; see ``token_batches``.

    Raises:
        TrainingError: if the data is empty or of no accepted kind; names the invalid item.
        OptionError: if ``max_tokens`` is not a positive integer.

    Example:
        >>> examples = training_set(torch.arange(3, 9), max_length=3)
        >>> [(item["input_ids"].tolist(), item["labels"].tolist()) for item in examples]
        [([3, 4, 5], [-100, 4, 5]), ([6, 7, 8], [-100, 7, 8])]
    """
    check_tokens(max_tokens)
    try:
        long = is_read_in_part(data)
        if is_streamed(data) and max_tokens is None:
            raise CalibrationError(
                "a stream may be endless; limit it with tokens=", argument="tokens"
            )
        # A long file of plain texts is not read as rows, since few of its lines are needed.
        rows = None if long and label is None and text == "text" else _rows(data)
        if rows is not None and label is not None and any(label in row for row in rows):
            items = _classified(rows, tokenizer, max_length, text, label)
            return Examples(draw(items, max_tokens, seed), classes=True)
        if rows is not None and not any("input_ids" in row for row in rows):
            data = _texts(rows, tokenizer, text)
        most = -(-max_tokens // max_length) if max_tokens and long else sys.maxsize
        column = text if is_streamed(data) and text != "text" else None
        found = _sequences(data, tokenizer, max_length, most, seed, bos, column)
        sequences = draw(found, max_tokens, seed)
    except CalibrationError as err:
        raise TrainingError(f"training data: {err}", argument=err.arguments) from err
    if masked:
        return Examples(_hide(sequences, tokenizer, seed), classes=False)
    return Examples([_next_tokens(item["input_ids"]) for item in sequences], classes=False)


def collate(items: Sequence[Example], pad: int = 0) -> Batch:
    """Stack examples into a batch, padded on the right.

    Args:
        items: examples of one kind.
        pad: padding id for ``input_ids``; ``labels`` are padded with -100.

    Example:
        >>> batch = collate(training_set([[5, 6, 7], [8, 9]]).items)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [8, 9, 0]], [[-100, 6, 7], [-100, 9, -100]])
    """
    ids, labels = ([item[name] for item in items] for name in ("input_ids", "labels"))
    classes = labels[0].dim() == 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.stack(labels) if classes else pad_sequence(labels, True, IGNORED),
    }


def batches(dataset: Dataset[Example], batch_size: int, pad: int = 0) -> list[Batch]:
    """Return all examples as batches, in order.

    Example:
        >>> [len(batch["labels"]) for batch in batches(training_set([[5, 6]] * 3), batch_size=2)]
        [2, 1]
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(
            f"batch_size={batch_size!r}; allowed: an integer of at least 1", argument="batch_size"
        )
    items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    return [collate(items[i : i + batch_size], pad) for i in range(0, len(items), batch_size)]


def is_read_in_part(data: Any) -> bool:
    """Return whether only the part of the data to train on is read: long texts and streams.

    Example:
        >>> is_read_in_part(["a text"])
        False
    """
    path = file_meant(data) if isinstance(data, str | os.PathLike) else None
    if path is not None and is_parquet(path):
        return False
    return is_streamed(data) or is_long(data)


def check_tokens(most: int | None) -> None:
    """Raise `OptionError` unless a number of tokens is a positive integer or None."""
    if most is not None and (not isinstance(most, int) or most < 1):
        raise OptionError(f"tokens={most!r}; allowed: an integer of at least 1, or None")


def _rows(data: Any) -> Rows | None:
    """Return data with columns as rows, or None if it is plain text or ids."""
    if hasattr(data, "column_names") and not isinstance(data, Mapping):
        return list(data) if hasattr(data, "__len__") else None
    if isinstance(data, str | os.PathLike):
        path = file_meant(data)
        if path is not None and is_parquet(path):
            table = open_table(path)
            return None if table is None else list(table.rows(0))
        return read_rows(path) if path is not None and is_lines(path) else None
    if isinstance(data, list | tuple) and any(isinstance(item, Mapping) for item in data):
        return check_rows(data)
    return None


def _texts(rows: Rows, tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[str]:
    """Return the texts of rows, or their conversations."""
    first = rows[0] if rows else {}
    if tokenizer is not None and text not in first and MESSAGES in first:
        return [conversation(row.get(MESSAGES), tokenizer) for row in rows]
    return [text_at(row, index, text) for index, row in enumerate(rows)]


def _classified(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    text: str,
    label: str,
) -> list[Example]:
    classes = [torch.tensor(class_at(row, index, label)) for index, row in enumerate(rows)]
    if all("input_ids" in row for row in rows):
        ids = [row["input_ids"][:max_length] for row in rows]
    elif tokenizer is None:
        raise TrainingError(
            "the training data is text, which needs the model's tokenizer: tokenizer=",
            argument="tokenizer",
        )
    else:
        texts = [text_at(row, index, text) for index, row in enumerate(rows)]
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    for index, row in enumerate(ids):
        if len(row) == 0:
            raise TrainingError(f"row {index} has no tokens")
    return [
        {"input_ids": torch.as_tensor(row).long(), "labels": one}
        for row, one in zip(ids, classes, strict=True)
    ]


def _sequences(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    most: int,
    seed: int,
    bos: bool | str,
    column: str | None,
) -> list[Example]:
    made = token_batches(
        data,
        tokenizer,
        num_samples=most,
        max_length=max_length,
        seed=seed,
        bos=bos,
        column=column,
    )
    return [{"input_ids": b["input_ids"][0][b["attention_mask"][0].bool()]} for b in made]


def draw(items: Sequence[Example], most: int | None, seed: int) -> list[Example]:
    """Draw examples with at most this many tokens in total (but at least one), in order.

    Example:
        >>> len(draw(training_set([[5, 6]] * 4).items, most=5, seed=0))
        2
    """
    if most is None:
        return list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = np.cumsum([len(items[index]["input_ids"]) for index in order])
    kept = max(1, int((ends <= most).sum()))
    return [items[index] for index in sorted(order[:kept])]


def _next_tokens(ids: Tensor) -> Example:
    labels = ids.clone()
    labels[0] = IGNORED  # nothing comes before it
    return {"input_ids": ids, "labels": labels}


def _hide(
    sequences: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> list[Example]:
    """Replace some tokens of every sequence, at least one, by the mask token."""
    token = None if tokenizer is None else tokenizer.mask_token_id
    if token is None:
        raise TrainingError(
            "training a masked language model needs a tokenizer with a mask token: tokenizer=",
            argument="tokenizer",
        )
    generator = torch.Generator().manual_seed(seed)
    items = []
    for item in sequences:
        ids = item["input_ids"].clone()
        labels = torch.full_like(ids, IGNORED)
        count = max(1, round(MASKED * len(ids)))
        hidden = torch.randperm(len(ids), generator=generator)[:count]
        labels[hidden], ids[hidden] = ids[hidden], token
        items.append({"input_ids": ids, "labels": labels})
    return items
