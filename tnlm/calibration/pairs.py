"""Pairs of texts: the input of an encoder, and the output of its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnlm.calibration.inputs import reads_targets
from tnlm.calibration.sequences import Batch, samples_of
from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_pairs(data: Any) -> bool:
    """Return whether data is a list of pairs of texts.

    Example:
        >>> is_pairs([("a text", "its summary")]), is_pairs([[3, 4]]), is_pairs(["a", "b"])
        (True, False, False)
    """
    return isinstance(data, list | tuple) and bool(data) and all(map(_is_pair, data))


def _is_pair(item: Any) -> bool:
    listed = isinstance(item, list | tuple) and len(item) == 2
    return listed and all(isinstance(text, str) for text in item)


def pair_samples(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    model: PreTrainedModel | None,
) -> list[Batch]:
    """Tokenise pairs one by one, with special tokens, each side truncated to ``max_length``.

    Raises:
        CalibrationError: if there is no tokenizer, or the model is not an encoder-decoder.
    """
    if tokenizer is None:
        raise CalibrationError(
            "calibration is text, which needs the model's tokenizer: tokenizer=",
            argument="tokenizer",
        )
    if not reads_targets(model):
        raise CalibrationError(
            "calibration is pairs of texts, which an encoder and a decoder share; for a "
            f"{type(model).__name__} give each pair as one text"
        )
    samples = []
    for first, second in pairs:
        options = {"truncation": True, "max_length": max_length}
        encoded = tokenizer(first, text_target=second, **options)
        samples += samples_of(encoded, max_length, model)
    return samples
