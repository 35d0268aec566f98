"""Calibration text that the model itself generates, sampled token by token.

Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888) generates data from a model to compress it;
Williams et al. 2024 (arXiv 2410.17711) compare such text with corpora for calibration.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from tnlm.calibration import cache
from tnlm.calibration.capacity import check_length
from tnlm.calibration.inputs import decodes, main_input
from tnlm.calibration.loss import sample
from tnlm.calibration.sequences import Batch
from tnlm.calibration.text import AUTO, check_bos
from tnlm.errors import CalibrationError, OptionError
from tnlm.targets.ends import vocabulary_of
from tnlm.utils.hashing import model_hash
from tnlm.utils.training_flags import modes_kept

SELF = "self"
"""The value of ``calibration=`` for text that the model generates; a file of that name is
``"./self"``."""
TOGETHER = 32
"""Number of sequences generated at once."""
VERSION = 1
"""Version of the way text is generated, so that caches of other versions are not read."""


def is_self(data: Any) -> bool:
    """Return whether data is the word for the model's own text.

    Example:
        >>> is_self("self"), is_self("./self"), is_self(["self"])
        (True, False, False)
    """
    return isinstance(data, str) and data == SELF


def own_samples(
    model: PreTrainedModel | None,
    count: int,
    length: int,
    *,
    seed: int = 0,
    bos: bool | str = AUTO,
    temperature: float = 1.0,
    cache_dir: str | Path | None = None,
) -> list[Batch]:
    """Generate sequences of token ids by a model, and return each as a batch of one.

    Each starts with BOS, or with a token drawn uniformly from the vocabulary. Every further token
    is sampled from the model's distribution, by a random number that depends only on the seed, the
    sequence and the position; so the number of sequences generated at once changes the text only by
    rounding. All sequences have the same length, and continue after an end-of-text token.

    Args:
        model: a text decoder; left unchanged.
        count: number of sequences.
        length: tokens per sequence, including the first.
        seed: seed of the random numbers.
        bos: whether sequences start with the BOS token of the model's config: True, False, or
            ``"auto"`` if it has one.
        temperature: divides the logits; below 1 for more probable text.
        cache_dir: cache of the text, which is reused for the same weights and arguments.

    Raises:
        CalibrationError: if the model does not generate text from left to right, has too few
            positions, or its logits are not finite.
        OptionError: if the temperature is not positive, or ``bos=True`` without a BOS token.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, bos_token_id=3)
        >>> [batch] = own_samples(GPT2LMHeadModel(config), count=1, length=6)
        >>> batch["input_ids"].shape, int(batch["input_ids"][0, 0])
        (torch.Size([1, 6]), 3)
    """
    model = _writer(model)
    if isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise OptionError(
            f"temperature={temperature!r}; allowed: a number above 0", argument="temperature"
        )
    check_bos(bos)
    check_length(model, length)
    first = _bos(model, bos)
    place = None
    if cache_dir is not None:
        settings = (VERSION, count, length, seed, first, float(temperature), model_hash(model))
        name = hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()
        place = Path(cache_dir) / name
    ids = None if place is None else _read(place)
    if ids is None:
        ids = _written(model, count, length, seed, first, temperature)
        if place is not None:
            folder = cache.Folder(place)
            folder.put(SELF, {"input_ids": ids})
            folder.finish({})
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]


def _writer(model: PreTrainedModel | None) -> PreTrainedModel:
    """Return the model, or raise an error with a remedy unless it generates text."""
    if model is None:
        raise CalibrationError("calibration='self' needs the model that generates the text")
    if main_input(model) != "input_ids":
        remedy = f"batches with {main_input(model)}, as its processor makes them"
    elif decodes(model):
        remedy = "pairs of texts with tokenizer=, or rows of input_ids and labels"
    elif not model.can_generate():
        remedy = "texts or a text file with tokenizer=, or token ids"
    else:
        return model
    raise CalibrationError(
        f"calibration='self': a {type(model).__name__} does not generate text from left to right; "
        f"give {remedy}",
        argument=("calibration", "tokenizer"),
    )


def _read(place: Path) -> Tensor | None:
    found = cache.read(place)
    return None if found is None else found[0].tensor(SELF, "input_ids")


def _written(
    model: PreTrainedModel,
    count: int,
    length: int,
    seed: int,
    start: int | None,
    temperature: float,
) -> Tensor:
    """Return ids ``(count, length)``; a larger count has the same first sequences."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, length, generator=generator, dtype=torch.float64)
    words = vocabulary_of(model)
    starts = _starts(model, draws[:, :1], start, words)
    if length == 1:
        return starts
    parts, generate = [], cast(Any, model).generate
    with _plain(model, length - 1), torch.no_grad():
        for first, numbers in zip(starts.split(TOGETHER), draws.split(TOGETHER), strict=True):
            first = first.to(model.device)
            drawn = LogitsProcessorList([_Drawn(numbers, temperature, words)])
            mask = torch.ones_like(first)
            parts.append(generate(first, attention_mask=mask, logits_processor=drawn))
    return torch.cat(parts).cpu()


def _bos(model: PreTrainedModel, bos: bool | str) -> int | None:
    """Return the first token of every sequence, or None to draw them at random."""
    if bos is False:
        return None
    configs = (model.generation_config, model.config.get_text_config())
    named = [getattr(config, "bos_token_id", None) for config in configs]
    words = vocabulary_of(model)
    known = [t for t in named if isinstance(t, int) and t >= 0 and (words is None or t < words)]
    if bos is True and not known:
        raise OptionError(
            f"bos=True, but the config of a {type(model).__name__} has no BOS token; use "
            "bos='auto' or False",
            argument="bos",
        )
    return known[0] if known else None


def _starts(model: PreTrainedModel, draws: Tensor, start: int | None, words: int | None) -> Tensor:
    """Return first tokens ``(count, 1)``."""
    if start is not None:
        return torch.full(draws.shape, start)
    if words is None:
        raise CalibrationError(
            f"the config of a {type(model).__name__} has neither a BOS token nor a vocabulary "
            "size; set bos_token_id"
        )
    return (draws * words).long().clamp_max(words - 1)


@contextmanager
def _plain(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Generate exactly this many tokens, independent of the model's settings, and restore these."""
    before = model.generation_config
    try:
        with modes_kept(model):
            model.eval()
            model.generation_config = GenerationConfig(
                max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
            )
            yield
    finally:
        model.generation_config = before


class _Drawn(LogitsProcessor):
    """Masks all next tokens of each sequence but the one that its random number selects.

    Args:
        draws: numbers in [0, 1), ``(sequences, length)``, one per position.
        temperature: divides the logits.
        words: vocabulary size; None for the number of logits.
    """

    def __init__(self, draws: Tensor, temperature: float, words: int | None) -> None:
        self.draws, self.temperature, self.words = draws, temperature, words

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.words].double() / self.temperature
        if not bool(logits.max(1).values.isfinite().all()):
            raise CalibrationError(
                "calibration='self': the model's logits are not finite; check its weights and dtype"
            )
        every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        chosen = sample(logits, every, self.draws[:, input_ids.shape[1]])
        return torch.full_like(scores, -math.inf).scatter(1, chosen[:, None], 0.0)
