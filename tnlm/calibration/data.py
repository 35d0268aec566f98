"""Converts texts, token ids and other data of many kinds to a list of batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tnlm.calibration.at_hand import drawn, samples_at_hand
from tnlm.calibration.columns import Column, check_column, table_samples, tabular
from tnlm.calibration.generated import is_self, own_samples
from tnlm.calibration.inputs import IGNORED, TEXT, check_main, main_input
from tnlm.calibration.pairs import is_pairs, pair_samples
from tnlm.calibration.sequences import ALLOWED, Batch, collated
from tnlm.calibration.sources import Memory, Source, open_source
from tnlm.calibration.text import AUTO, check_bos, read_text, start_token
from tnlm.calibration.windows import text_windows
from tnlm.errors import CalibrationError, OptionError
from tnlm.utils.checks import check_whole, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Batch", "count_tokens", "fingerprint", "read_text", "token_batches"]


def token_batches(
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_samples: int = 64,
    max_length: int = 512,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | str = AUTO,
    column: Column = None,
    temperature: float | None = None,
    cache_dir: str | Path | None = None,
    model: PreTrainedModel | None = None,
) -> list[Batch]:
    """Convert calibration data of any accepted kind to batches on the CPU.

    Texts (strings, files, a ``text`` column) are joined by blank lines and tokenised once without
    special tokens; these ids, and 1-D ids, are cut into full windows without overlap. For texts
    over 16 MiB, only some chunks are read, and tokenised separately. If the tokenizer adds a BOS
    token by default, each window of text starts with it instead of having a last token. Sequences
    (2-D ids, lists, DataLoaders, an ``input_ids`` column) stay rows, with their masks and, if
    ``labels`` has one class per sequence, with their classes.

    Rows with named columns (a list of dicts, a parquet file, a stream of ``datasets``,
    conversations) are drawn in random order, from a stream by a buffer, until there are enough
    windows.

    A processor's batches (images, audio, or these with text) and pairs for an encoder and a decoder
    keep all inputs of the model's ``forward``. Each image, clip and pair becomes its own batch,
    without padding; a batch with images or audio beside text is not changed, and counts as one
    sample.

    Args:
        calibration: texts, pairs of texts, the path of a text or ``.jsonl`` file, ids, a loader or
            dataset, or ``"self"`` for text that the model generates. Any other string is a text
            only if it cannot be a file name; texts are better given in a list.
        tokenizer: needed only for text.
        num_samples: most sequences to draw, in the data's order; a DataLoader gives its first.
        max_length: tokens per window, and most tokens per row or per side of a pair.
        batch_size: sequences of text per batch; shorter rows are padded on the right and masked.
        seed: chooses the sequences if there are more than ``num_samples``.
        bos: whether a window of text starts with BOS: ``"auto"``, True or False; see
            :func:`tnlm.calibration.text.start_token`, and for ``"self"``
            :func:`tnlm.calibration.generated.own_samples`.
        column: column of texts in rows with named columns; two columns for pairs. By default, the
            model's main input, or else ``text``, or else ``messages``, which the tokenizer's chat
            template formats.
        temperature: temperature of text that the model generates; 1 by default.
        cache_dir: cache of this text.
        model: the model to run on the data, whose ``main_input_name`` must be among the columns.
            Columns that it does not accept are ignored, except images, audio and embeddings, which
            raise an error. Without a model, only token ids with masks and classes are accepted.

    Raises:
        CalibrationError: if the data is empty, unreadable or of no accepted kind.
        OptionError: if an option is out of range, or ``bos=True`` is given without text.

    Example:
        >>> batches = token_batches(torch.arange(10), max_length=4)
        >>> [batch["input_ids"].tolist() for batch in batches]
        [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    """
    _check_positive(num_samples=num_samples, max_length=max_length, batch_size=batch_size)
    check_whole("seed", seed, -(2**63), 2**63 - 1)
    check_bos(bos)
    check_column(column)
    if is_self(calibration):
        samples = own_samples(
            model,
            num_samples,
            max_length,
            seed=seed,
            bos=bos,
            temperature=1.0 if temperature is None else temperature,
            cache_dir=cache_dir,
        )
    elif temperature is not None:
        raise OptionError(
            "temperature= is for calibration='self', text that the model generates",
            argument=("temperature", "calibration"),
        )
    elif (table := tabular(calibration, column, main_input(model))) is not None:
        samples = table_samples(
            table,
            tokenizer,
            count=num_samples,
            max_length=max_length,
            seed=seed,
            bos=bos,
            column=column,
            model=model,
        )
    elif (source := text_of(calibration)) is not None:
        samples = text_windows(source, tokenizer, max_length, num_samples, seed, bos)
    elif bos is True:
        raise OptionError("bos=True is for text; token ids are not changed", argument="bos")
    elif is_pairs(calibration):
        samples = pair_samples(calibration, tokenizer, max_length, model)
    else:
        samples = samples_at_hand(calibration, num_samples, max_length, seed, model)
    if not samples:
        raise CalibrationError(f"calibration has no tokens; give {ALLOWED}")
    check_main(samples[0], model)
    return collated(drawn(samples, num_samples, seed), batch_size)


def count_tokens(batches: Iterable[Batch]) -> int:
    """Count the unmasked tokens of encoders and decoders; an image or a clip counts as one.

    Example:
        >>> count_tokens(token_batches([[5, 6, 7], [8]], batch_size=2))
        4
        >>> count_tokens([{"pixel_values": torch.zeros(2, 3, 8, 8)}])
        2
    """
    return sum(_tokens_of(batch) for batch in batches)


def _tokens_of(batch: Batch) -> int:
    """Count the tokens of the encoder, or of the only stack, and those of the decoder."""
    first = batch.get("attention_mask", batch.get("input_ids"))
    count = len(next(iter(batch.values())))
    if "input_ids" in batch and first is not None:
        count = int((first != 0).sum()) if "attention_mask" in batch else first.numel()
    if "decoder_attention_mask" in batch:
        return count + int(batch["decoder_attention_mask"].sum())
    if "decoder_input_ids" in batch:
        return count + batch["decoder_input_ids"].numel()
    if "labels" in batch and batch["labels"].dim() > 1:
        return count + int((batch["labels"] != IGNORED).sum())
    return count


def fingerprint(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 hash of the batches' tensors.

    Example:
        >>> a, b = (token_batches(torch.arange(n), max_length=4) for n in (8, 9))
        >>> fingerprint(a) == fingerprint(b)
        True
    """
    digest = hashlib.sha256()
    for batch in batches:
        for name in TEXT:
            if name in batch:
                _update(digest, batch[name].long())
        for name in sorted(batch.keys() - set(TEXT)):
            digest.update(f"{name} {batch[name].dtype} ".encode())
            _update(digest, batch[name])
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(repr(tuple(tensor.shape)).encode())
    digest.update(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _check_positive(**options: int) -> None:
    """Raise `OptionError` for counts below 1."""
    for name, value in options.items():
        if not is_whole(value) or value < 1:
            raise OptionError(f"{name}={value!r}; allowed: an integer of at least 1", argument=name)


def text_of(data: Any) -> Source | None:
    """Return data as a text, or None if it contains token ids.

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
    """Return whether data is a text, texts, a text file, or a dataset with only texts.

    Example:
        >>> is_text("text.txt"), is_text(["a text"]), is_text([1, 2])
        (True, True, False)
    """
    if is_self(data):
        return False
    if isinstance(data, list | tuple):
        return any(isinstance(item, str) for item in data)
    columns = () if isinstance(data, Mapping) else getattr(data, "column_names", None) or ()
    rows = "text" in columns and "input_ids" not in columns and hasattr(data, "__len__")
    return rows or isinstance(data, str | os.PathLike)


def begins(data: Any, tokenizer: PreTrainedTokenizerBase | None, bos: bool | str = AUTO) -> bool:
    """Return whether windows of data start with BOS, which only text does.

    Example:
        >>> begins([[1, 2], [3]], None)
        False
    """
    return tokenizer is not None and is_text(data) and start_token(tokenizer, bos) is not None


def _join(texts: Sequence[Any]) -> str:
    """Join texts by blank lines."""
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration mixes strings with a {type(text).__name__}; give strings only"
            )
    return "\n\n".join(texts)
