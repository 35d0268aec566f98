"""Cuts texts and token ids into windows of the same length, without overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnlm.calibration.sequences import Batch
from tnlm.calibration.sources import WHOLE, Source, drawn_windows
from tnlm.calibration.text import start_token, tokenize
from tnlm.errors import CalibrationError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_windows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    count: int,
    seed: int,
    bos: bool | str,
) -> list[Batch]:
    """Cut a text into windows: all of a short text, only as many as needed of a long one.

    Raises:
        CalibrationError: if there is no tokenizer, or no full window.
        OptionError: if BOS leaves no room for tokens.
    """
    if tokenizer is None:
        raise CalibrationError(
            "calibration is text, which needs the model's tokenizer: tokenizer=",
            argument="tokenizer",
        )
    start = start_token(tokenizer, bos)
    if start is not None and max_length < 2:
        raise OptionError(
            f"max_length={max_length} leaves no room after BOS; use at least 2",
            argument="max_length",
        )
    length = max_length - (start is not None)
    if source.size > WHOLE:
        found = drawn_windows(source, tokenizer, length, count, seed)
        if not found:
            raise CalibrationError(
                f"no part of the calibration text has a window of max_length={max_length} "
                "tokens; use a smaller one",
                argument="max_length",
            )
        return [_sample(window, start) for window in found]
    text = source.part(0, source.size)
    return id_windows(tokenize(text, tokenizer), length, start) if text.strip() else []


def id_windows(ids: Tensor, length: int, start: int | None = None) -> list[Batch]:
    """Cut ids ``(tokens,)`` into full windows without overlap, each with a start token first.

    Example:
        >>> [window["input_ids"].tolist() for window in id_windows(torch.arange(5), 2)]
        [[[0, 1]], [[2, 3]]]
    """
    more = int(start is not None)
    if 0 < len(ids) < length:
        raise CalibrationError(
            f"calibration has {len(ids)} tokens, fewer than one window of "
            f"max_length={length + more}; use max_length<={len(ids) + more} or give more text",
            argument="max_length",
        )
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    return [_sample(window, start) for window in windows]


def _sample(window: Tensor, start: int | None) -> Batch:
    if start is not None:
        window = torch.cat([window.new_tensor([start]), window])
    return {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
