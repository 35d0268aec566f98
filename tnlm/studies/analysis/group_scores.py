"""What a model is worth: a user's function, or perplexity on text or token ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.data import token_batches
from tnlm.calibration.loss import IGNORED, make_tasks
from tnlm.calibration.walk import run
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import check_positions, evaluating
from tnlm.evaluation.perplexity import perplexity

Value = Callable[[PreTrainedModel], float]
"""Measures a model, which it leaves as it was."""


def make_metric(
    model: PreTrainedModel,
    metric: Any,
    tokenizer: Any,
    window: int,
    windows: int,
    higher_is_better: bool,
) -> Value:
    """Return a function that measures models like this one.

    Args:
        model: has a head over its vocabulary, for perplexity.
        metric: a function, text, a path, a list of strings, or token ids.
        tokenizer: for text.
        window: tokens in a window of text or ids.
        windows: windows measured, from the start.
        higher_is_better: only a function may be better when larger.

    Raises:
        OptionError: if the arguments do not go together.
        EvaluationError: if the model has no head.

    Example:
        >>> make_metric(nn.Linear(1, 1), "some text", None, 8, 1, higher_is_better=True)
        Traceback (most recent call last):
        tnlm.errors.OptionError: higher_is_better=True is for a function; perplexity is better ...
    """
    if callable(metric):
        return metric  # type: ignore[no-any-return]
    if higher_is_better:
        raise OptionError(
            "higher_is_better=True is for a function; perplexity is better when it is lower"
        )
    for name, value in (("window", window), ("windows", windows)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}; allowed: a whole number >= 1")
    if isinstance(metric, list | tuple) and any(isinstance(item, str) for item in metric):
        metric = "\n\n".join(metric)
    if isinstance(metric, str | Path):
        return lambda m: perplexity(m, metric, tokenizer, window=window, windows=windows).perplexity
    if not isinstance(metric, Tensor | np.ndarray | list | tuple):
        raise OptionError(
            f"metric is a {type(metric).__name__}; allowed: a function of the model, text, a path, "
            "or token ids"
        )
    return _on_ids(model, metric, window, windows)


def _on_ids(model: PreTrainedModel, ids: Any, window: int, windows: int) -> Value:
    """Return the perplexity on the first windows of ids, or on the first rows."""
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise EvaluationError(
            f"{type(model).__name__} has no head over its vocabulary; perplexity needs one; give a "
            "function as metric="
        )
    check_positions(model, window, f"window={window}")
    batches = token_batches(ids, max_length=window, num_samples=2**62)[:windows]
    tasks = make_tasks(model, batches, "data")
    count = sum(int((task.labels != IGNORED).sum()) for task in tasks)
    if count == 0:
        raise EvaluationError("the token ids predict nothing: every row has one token")

    def value(measured: PreTrainedModel) -> float:
        with evaluating(measured):
            losses = [float(task.loss(measured, run(measured, task.batch))) for task in tasks]
        return math.exp(min(math.fsum(losses) / count, 700.0))

    return value
