"""Training examples: rows of token ids with what a model is to predict on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, token_batches
from tnlm.calibration.loss import IGNORED
from tnlm.errors import CalibrationError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Tensor]
"""``input_ids`` ``(length,)`` and ``labels``: ids ``(length,)``, or a class ``()``."""

MASKED = 0.15
"""Share of the tokens that a masked language model predicts (Devlin et al. 2019)."""
MANY = 10**9


def examples(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int = 512,
    most: int = MANY,
    seed: int = 0,
) -> list[Example]:
    """Turn data of any kind that calibration takes into training examples.

    A causal model is to predict every next token, a classifier the class of a sequence, a masked
    language model 15 % of the tokens, which are replaced by its tokenizer's mask.

    Args:
        model: says by its class which of these.
        data: see :func:`tnlm.calibration.data.token_batches`; for a classifier see
            :func:`tnlm.calibration.labelled.labelled`.
        tokenizer: needed for texts, and for masked language models.
        max_length: tokens of an example.
        most: examples at most.
        seed: draws them, and what is masked.

    Raises:
        CalibrationError: if there is no data, or a classifier's rows have no labels, or a masked
            language model's tokenizer is missing.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> examples(model, torch.arange(6), max_length=3)[1]["labels"]
        tensor([3, 4, 5])
    """
    kept = {"num_samples": most, "max_length": max_length, "seed": seed}
    batches = token_batches(data, tokenizer, **kept)
    generator = torch.Generator().manual_seed(seed)
    return [_example(model, batch, tokenizer, generator) for batch in batches]


def _example(
    model: PreTrainedModel, batch: Batch, tokenizer: Any, generator: torch.Generator
) -> Example:
    kind = type(model).__name__
    ids, seen = batch["input_ids"][0], batch["attention_mask"][0].bool()
    if kind.endswith("ForSequenceClassification"):
        if "labels" not in batch:
            raise CalibrationError(f"a {kind} needs rows with 'labels'; see tnlm.labelled")
        return {"input_ids": ids[seen], "labels": batch["labels"][0]}
    if not kind.endswith("ForMaskedLM"):
        return {"input_ids": ids[seen], "labels": ids[seen]}
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise CalibrationError(f"a {kind} needs a tokenizer with a mask token")
    ids = ids[seen]
    chosen = torch.rand(len(ids), generator=generator) < MASKED
    chosen[int(torch.randint(len(ids), (), generator=generator))] = True  # at least one
    labels = ids.masked_fill(~chosen, IGNORED)
    return {"input_ids": ids.masked_fill(chosen, mask), "labels": labels}


def lesson_batches(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    most: int = MANY,
    seed: int = 0,
) -> list[Batch]:
    """Turn data into batches with labels, unless it is a list of these already.

    Args:
        model: see :func:`examples`.
        data: likewise.
        tokenizer: likewise.
        batch_size: examples in a batch.
        max_length: tokens of an example.
        most: examples at most.
        seed: draws them.

    Raises:
        OptionError: for a batch size below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}; allowed: a whole number >= 1")
    if isinstance(data, list | tuple) and data and all(map(_is_batch, data)):
        return list(data)
    found = examples(model, data, tokenizer, max_length=max_length, most=most, seed=seed)
    return [collate(found[i : i + batch_size]) for i in range(0, len(found), batch_size)]


def _is_batch(item: Any) -> bool:
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    return isinstance(ids, Tensor) and ids.dim() == 2 and item.get("labels") is not None


def collate(rows: Sequence[Example]) -> Batch:
    """Stack examples into a batch, padded on the right; padding is neither seen nor predicted.

    Example:
        >>> ids = [torch.tensor([1, 2]), torch.tensor([3])]
        >>> collate([{"input_ids": row, "labels": row} for row in ids])["labels"].tolist()
        [[1, 2], [3, -100]]
    """
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    classes = labels[0].dim() == 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.stack(labels)
        if classes
        else pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
