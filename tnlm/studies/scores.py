"""Scores of a model: its loss or accuracy on data, or whatever a callable returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.inputs import IGNORED
from tnlm.errors import EvaluationError, OptionError, did_you_mean
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.number import finite

SCORES = ("accuracy", "loss")

Score = str | Callable[[Any], float]
"""``"loss"``, ``"accuracy"``, or a callable that takes a model; its score is higher if better."""

ModelScore = Callable[[PreTrainedModel], Any]
"""Takes a model; returns a number, or a mapping from names to numbers."""


def measure(model: Any, score: Score, batches: Sequence[Batch]) -> float:
    """Return a model's mean loss per prediction, its accuracy, or the score of a callable.

    Raises:
        EvaluationError: if the score is not a finite number.

    Example:
        >>> measure(None, lambda model: 0.5, [])
        0.5
    """
    with evaluating(*([model] if isinstance(model, nn.Module) else [])):
        if callable(score):
            value = score(model)
        elif score == "accuracy":
            value = _accuracy(model, batches)
        else:
            value = _loss(model, batches)
    what = f"{name_of(score)} of {type(model).__name__}"
    if isinstance(value, bool):
        raise EvaluationError(f"{what} is {value}; it must be a number")
    return finite(value, what)


def named_scores(
    model: PreTrainedModel, score: ModelScore, name: str = "value"
) -> dict[str, float]:
    """Return a model's scores as finite numbers by name.

    Args:
        model: what is scored.
        score: returns a number, or a mapping from names to numbers.
        name: the name of a single number.

    Raises:
        EvaluationError: if it returns no number, or one that is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> named_scores(model, lambda model: model.num_parameters(), "size")
        {'size': 1176.0}
    """
    found = score(model)
    values = dict(found) if isinstance(found, Mapping) else {name: found}
    if not values:
        raise EvaluationError("the score is an empty mapping; return at least one number")
    return {str(key): finite(value, f"the score {key!r}") for key, value in values.items()}


def name_of(score: Score) -> str:
    """Return the name of a score.

    Example:
        >>> name_of("loss"), name_of(len)
        ('loss', 'len')
    """
    return score if isinstance(score, str) else getattr(score, "__name__", "callable")


def check_score(score: Score, kind: str) -> None:
    """Raise `OptionError` if a score is unknown, or if a kind of model does not have it.

    Args:
        score: as given by the user.
        kind: as returned by `tnlm.recovery.model_kinds.model_kind`.

    Example:
        >>> check_score("loss", "causal")
    """
    if callable(score):
        return
    if score not in SCORES:
        raise OptionError(f"score={score!r}{did_you_mean(str(score), SCORES)}, or a callable")
    if score == "accuracy" and kind != "classes":
        raise OptionError(
            f"score='accuracy' needs a classifier, but the model is a {kind} language model; use "
            "'loss', or a callable that takes the model"
        )


def _loss(model: Any, batches: Sequence[Batch]) -> float:
    losses, counts = [], []
    for batch in batches:
        count = int((batch["labels"] != IGNORED).sum())
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        losses.append(float(loss.double()) * count)
        counts.append(count)
    return math.fsum(losses) / sum(counts)


def _accuracy(model: Any, batches: Sequence[Batch]) -> float:
    right = count = 0
    for batch in batches:
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(**moved).logits
        if not bool(logits.isfinite().all()):
            return math.nan
        right += int((logits.argmax(-1) == moved["labels"]).sum())
        count += len(logits)
    return right / count
