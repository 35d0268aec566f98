"""What a model is to predict on a batch, and the loss whose gradients say what matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.errors import CalibrationError, OptionError, did_you_mean

LABELS = ("sampled", "data")
"""Predictions drawn from the model itself (true Fisher), or the tokens of the data (empirical)."""

IGNORED = -100
POSITIONS = 128
"""Positions sampled at once, as each takes a distribution over the vocabulary in float64."""


@dataclass(frozen=True)
class Task:
    """A batch with what a model is to predict.

    Args:
        batch: the tokens.
        labels: the data's own labels ``(sequences, length)``, ``IGNORED`` where none is predicted;
            for a classifier the classes ``(sequences,)``.
        draws: for each prediction a uniform number in [0, 1) that chooses a label from the model's
            distribution, in its place; None to take the labels.
    """

    batch: Batch
    labels: Tensor
    draws: Tensor | None = None

    def loss(self, model: PreTrainedModel, output: Any) -> Tensor:
        """Return the cross-entropy of a model's output, summed over predictions, in float32.

        Raises:
            CalibrationError: if the output holds no logits over the vocabulary, or over classes,
                or the data has a class that the model has not.
        """
        logits = getattr(output, "logits", None)
        words = model.config.get_text_config(decoder=True).vocab_size
        least = 2 if self.labels.dim() == 1 else words
        if (
            not isinstance(logits, Tensor)
            or logits.dim() != self.labels.dim() + 1
            or logits.shape[-1] < least
        ):
            raise CalibrationError(
                f"gradients need a model with an output head over its vocabulary, or over classes, "
                f"but a {type(model).__name__} has none; load it with its head, or use a metric "
                "without gradients"
            )
        if int(self.labels.max()) >= logits.shape[-1]:
            raise CalibrationError(
                f"a label is {int(self.labels.max())}; the model has {logits.shape[-1]} classes"
            )
        flat, labels = logits.flatten(0, -2), self.labels.flatten().to(logits.device, copy=True)
        if self.draws is not None:
            labels[labels != IGNORED] = sample(flat.detach(), labels != IGNORED, self.draws)
        return F.cross_entropy(flat.float(), labels, ignore_index=IGNORED, reduction="sum")


def make_tasks(
    model: PreTrainedModel, batches: Sequence[Batch], labels: str = "sampled", seed: int = 0
) -> list[Task]:
    """Say what a model is to predict: next tokens, all tokens, or the class of a sequence.

    A masked language model predicts all its tokens, a sequence classifier one class.

    Args:
        model: says by its class which of the two.
        batches: padding is neither predicted nor predicted from.
        labels: ``"sampled"`` or ``"data"``.
        seed: chooses the samples; the same for the same sequences, in batches of any size.

    Raises:
        OptionError: if ``labels`` is neither.
        CalibrationError: if a classifier is to predict the data's labels, and there are none.
    """
    if labels not in LABELS:
        raise OptionError(f"labels={labels!r}{did_you_mean(str(labels), LABELS)}")
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    causal = model.config.is_encoder_decoder or model.can_generate()
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for batch in batches:
        wanted = _classes(batch, labels) if classifies else _labels(batch, causal)
        count, draws = int((wanted != IGNORED).sum()), None
        if labels == "sampled":
            draws = torch.rand(count, generator=generator, dtype=torch.float64)
        tasks.append(Task(batch, wanted, draws))
    return tasks


def _classes(batch: Batch, labels: str) -> Tensor:
    if labels == "data" and "labels" not in batch:
        raise CalibrationError(
            "a classifier's Fisher information needs the class of every sequence; give calibration "
            "data with 'labels'"
        )
    return batch.get("labels", torch.zeros(len(batch["input_ids"]), dtype=torch.int64))


def _labels(batch: Batch, causal: bool) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if not causal:
        return ids.masked_fill(~mask, IGNORED)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)
    return labels


def sample(logits: Tensor, chosen: Tensor, draws: Tensor) -> Tensor:
    """Return a token from the distribution at each chosen position, by inverse transform.

    Args:
        logits: ``(positions, words)``.
        chosen: which positions, ``(positions,)`` bool.
        draws: uniform numbers in [0, 1), one for each chosen position.

    Example:
        >>> sample(torch.zeros(3, 4), torch.tensor([True, False, True]), torch.tensor([0.1, 0.9]))
        tensor([0, 3])
    """
    found = []
    places = chosen.nonzero().flatten().split(POSITIONS)
    for at, uniform in zip(places, draws.to(logits.device).split(POSITIONS), strict=True):
        reached = logits[at].double().softmax(-1).cumsum(-1)
        level = uniform.double().unsqueeze(1) * reached[:, -1:]
        # The first word whose cumulated probability exceeds the draw: never one of probability 0.
        words = torch.searchsorted(reached, level, right=True).flatten()
        found.append(words.clamp_max(logits.shape[-1] - 1))
    return torch.cat(found)
