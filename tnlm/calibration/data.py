"""Turn texts or token ids of many kinds into one list of token batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tnlm.calibration.sequences import ALLOWED, Row, sequence_rows, token_ids
from tnlm.calibration.sources import (
    WHOLE,
    Memory,
    Source,
    drawn_windows,
    open_source,
)
from tnlm.calibration.text import AUTO, check_bos, read_text, start_token, tokenize
from tnlm.errors import CalibrationError, OptionError
from tnlm.utils.checks import check_whole, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Batch", "count_tokens", "fingerprint", "read_text", "token_batches"]

Batch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64, both ``(sequences, length)``; for a classifier also
``labels``, the class of every sequence, ``(sequences,)``."""

_T = TypeVar("_T")


def token_batches(
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_samples: int = 64,
    max_length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | str = AUTO,
    model: PreTrainedModel | None = None,
) -> list[Batch]:
    """Turn calibration data of any accepted kind into token batches on the CPU.

    Texts (strings, files, a ``text`` column) are joined by blank lines and tokenised once without
    special tokens; these ids, and 1-D ids, are cut into full windows without overlap. Of a text of
    more than 16 MiB only some chunks are read, and tokenised each by itself. A window of text
    begins with the BOS token, in place of its last, if the tokenizer does so by itself. Sequences
    (2-D ids, lists, DataLoaders, an ``input_ids`` column) stay rows, with their masks and, where
    ``labels`` holds one class for each sequence, with that.

    Args:
        calibration: texts, the path of a text or ``.jsonl`` file, ids, or a loader or dataset. A
            string is a text only if it cannot be meant as a file's name; give texts as a list.
        tokenizer: needed for text only.
        num_samples: sequences drawn at most, in the data's order; a DataLoader gives its first.
        max_length: tokens of a window, and at most of a row.
        batch_size: sequences in a batch; shorter rows are padded on the right and masked.
        seed: chooses the sequences when there are more than ``num_samples``.
        bos: whether a window of text begins with BOS: ``"auto"``, True or False; see
            :func:`tnlm.calibration.text.start_token`.
        model: that the data is for: columns that it takes, and that would be lost, are refused.

    Raises:
        CalibrationError: for data that is empty, unreadable or of no accepted kind.
        OptionError: for an option out of range, or ``bos=True`` without text.

    Example:
        >>> batches = token_batches(torch.arange(10), max_length=4)
        >>> [batch["input_ids"].tolist() for batch in batches]
        [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    """
    _check_positive(num_samples=num_samples, max_length=max_length, batch_size=batch_size)
    check_whole("seed", seed, -(2**63), 2**63 - 1)
    check_bos(bos)
    source = text_of(calibration)
    if source is not None:
        rows = _text_windows(source, tokenizer, max_length, num_samples, seed, bos)
    elif bos is True:
        raise OptionError("bos=True is for text; token ids are taken as they are")
    elif isinstance(calibration, DataLoader):
        rows = _first_rows(calibration, num_samples, max_length, model)
    elif hasattr(calibration, "column_names") and not isinstance(calibration, Mapping):
        rows = _dataset_rows(calibration, num_samples, max_length, seed, model)
    else:
        rows = _rows(calibration, max_length, model)
    if not rows:
        raise CalibrationError(f"calibration holds no tokens; give {ALLOWED}")
    rows = _draw(rows, num_samples, seed)
    return [_collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def count_tokens(batches: Iterable[Batch]) -> int:
    """Count the tokens that are not masked.

    Example:
        >>> count_tokens(token_batches([[5, 6, 7], [8]], batch_size=2))
        4
    """
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def fingerprint(batches: Iterable[Batch]) -> str:
    """Name the contents of the batches: the same tokens and masks give the same SHA-256.

    Example:
        >>> a, b = (token_batches(torch.arange(n), max_length=4) for n in (8, 9))
        >>> fingerprint(a) == fingerprint(b)
        True
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name in (key for key in ("input_ids", "attention_mask", "labels") if key in batch):
            tensor = batch[name].to("cpu", torch.int64).contiguous()
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _check_positive(**options: int) -> None:
    """Refuse counts below 1."""
    for name, value in options.items():
        if not is_whole(value) or value < 1:
            raise OptionError(f"{name}={value!r}, but it must be an integer of at least 1")


def text_of(data: Any) -> Source | None:
    """Return data as a text, or None if it holds token ids.

    Example:
        >>> text_of(["one", "two"]).size, text_of([[1, 2], [3]])
        (8, None)
    """
    if not is_text(data):
        return None
    if isinstance(data, str | os.PathLike):
        return open_source(data)
    return Memory(_join(data if isinstance(data, list | tuple) else list(data["text"])))


def is_text(data: Any) -> bool:
    """Whether data is a text, texts, a file of them, or a dataset with no more than texts.

    Example:
        >>> is_text("text.txt"), is_text(["a text"]), is_text([1, 2])
        (True, True, False)
    """
    if isinstance(data, list | tuple):
        return any(isinstance(item, str) for item in data)
    columns = () if isinstance(data, Mapping) else getattr(data, "column_names", None) or ()
    rows = "text" in columns and "input_ids" not in columns and hasattr(data, "__len__")
    return rows or isinstance(data, str | os.PathLike)


def begins(data: Any, tokenizer: PreTrainedTokenizerBase | None, bos: bool | str = AUTO) -> bool:
    """Whether windows of data begin with BOS: it must be text.

    Example:
        >>> begins([[1, 2], [3]], None)
        False
    """
    return tokenizer is not None and is_text(data) and start_token(tokenizer, bos) is not None


def _rows(data: Any, max_length: int, model: PreTrainedModel | None) -> list[Row]:
    """Return the sequences of data that is at hand: ids or a list of these."""
    if isinstance(data, Mapping):
        return sequence_rows(data, max_length, model)
    if isinstance(data, list | tuple) and not all(isinstance(i, int | np.integer) for i in data):
        return [row for item in data for row in sequence_rows(item, max_length, model)]
    if isinstance(data, list | tuple | np.ndarray | Tensor):
        ids = token_ids(data)
        return _windows(ids, max_length) if ids.ndim == 1 else sequence_rows(ids, max_length)
    raise CalibrationError(f"calibration is a {type(data).__name__}, but must be {ALLOWED}")


def _join(texts: Sequence[Any]) -> str:
    """Join texts by blank lines."""
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration mixes strings with a {type(text).__name__}; give strings only"
            )
    return "\n\n".join(texts)


def _text_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    count: int,
    seed: int,
    bos: bool | str,
) -> list[Row]:
    """Cut a text into windows: a short one whole, of a long one no more than are wanted."""
    if tokenizer is None:
        raise CalibrationError("calibration is text, which needs the model's tokenizer: tokenizer=")
    start = start_token(tokenizer, bos)
    if start is not None and max_length < 2:
        raise OptionError(f"max_length={max_length} leaves no room after BOS; use at least 2")
    length = max_length - (start is not None)
    if source.size > WHOLE:
        found = drawn_windows(source, tokenizer, length, count, seed)
        if not found:
            raise CalibrationError(
                f"no part of the calibration text holds a window of max_length={max_length} "
                "tokens; use a smaller one"
            )
        return [_row(window, start) for window in found]
    text = source.part(0, source.size)
    return _windows(tokenize(text, tokenizer), length, start) if text.strip() else []


def _windows(ids: Tensor, length: int, start: int | None = None) -> list[Row]:
    """Cut ids ``(tokens,)`` into full windows without overlap, each after a start token."""
    more = int(start is not None)
    if 0 < len(ids) < length:
        raise CalibrationError(
            f"calibration has {len(ids)} tokens, fewer than one window of "
            f"max_length={length + more}; use max_length<={len(ids) + more} or give more text"
        )
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    return [_row(window, start) for window in windows]


def _row(window: Tensor, start: int | None) -> Row:
    if start is not None:
        window = torch.cat([window.new_tensor([start]), window])
    return Row(window, torch.ones_like(window))


def _first_rows(
    loader: DataLoader[Any], count: int, max_length: int, model: PreTrainedModel | None
) -> list[Row]:
    """Return the first sequences of a DataLoader, and read no further."""
    rows: list[Row] = []
    for item in loader:
        rows += sequence_rows(item, max_length, model)
        if len(rows) >= count:
            break
    return rows[:count]


def _dataset_rows(
    dataset: Any, count: int, max_length: int, seed: int, model: PreTrainedModel | None
) -> list[Row]:
    """Return sequences of a ``datasets.Dataset``; only the ``input_ids`` drawn are read."""
    columns = dataset.column_names or []
    if not hasattr(dataset, "__len__"):
        raise CalibrationError(
            "calibration is a streamed dataset; give a list, e.g. [row['text'] for row in "
            "dataset.take(1000)]"
        )
    if "input_ids" in columns:
        drawn = _draw(range(len(dataset)), count, seed)
        return [row for i in drawn for row in sequence_rows(dataset[i], max_length, model)]
    raise CalibrationError(
        f"the calibration dataset has the columns {columns}; it needs 'input_ids' or 'text'"
    )


def _draw(items: Sequence[_T], count: int, seed: int) -> list[_T]:
    """Draw at most ``count`` items without replacement, in their own order."""
    if len(items) <= count:
        return list(items)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[i] for i in chosen.tolist()]


def _collate(rows: Sequence[Row]) -> Batch:
    """Stack rows into one batch, padded on the right to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([row.ids for row in rows], batch_first=True),
        "attention_mask": pad([row.mask for row in rows], batch_first=True),
    }
    labels = [row.label for row in rows if row.label is not None]
    return batch | {"labels": torch.tensor(labels)} if len(labels) == len(rows) else batch
