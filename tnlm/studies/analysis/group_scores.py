"""Scores of a model with a group of singular values removed: a function, or the perplexity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import token_batches
from tnlm.calibration.loss import make_tasks
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import check_positions
from tnlm.evaluation.perplexity import batch_perplexity, perplexity
from tnlm.targets.ends import output_head
from tnlm.utils.checks import check_whole

GroupScore = Callable[[PreTrainedModel], float]
"""Returns the score of a model, which it leaves unchanged."""


def make_score(
    model: PreTrainedModel,
    score: Any,
    tokenizer: Any,
    window: int,
    windows: int,
    higher_is_better: bool,
) -> GroupScore:
    """Return a function that scores models like this one.

    Args:
        model: needs a head over its vocabulary, for the perplexity.
        score: a function; or text, a path, a list of strings or token ids.
        tokenizer: needed for text.
        window: tokens per window of text or ids.
        windows: how many windows to measure, from the start.
        higher_is_better: whether higher values of a function are better.

    Raises:
        OptionError: if the arguments are invalid or do not fit together.
        EvaluationError: if the model has no head.

    Example:
        >>> from torch import nn
        >>> make_score(nn.Linear(1, 1), "some text", None, 8, 1, higher_is_better=True)
        Traceback (most recent call last):
        tnlm.errors.OptionError: higher_is_better=True needs a function; ...
    """
    if callable(score):
        return score  # type: ignore[no-any-return]
    if higher_is_better:
        raise OptionError(
            "higher_is_better=True needs a function; a perplexity is better when lower"
        )
    for name, value in (("window", window), ("windows", windows)):
        check_whole(name, value)
    if isinstance(score, list | tuple) and any(isinstance(item, str) for item in score):
        texts = list(score)
        return lambda m: perplexity(m, texts, tokenizer, window=window, windows=windows).perplexity
    if isinstance(score, str | Path):
        return lambda m: perplexity(m, score, tokenizer, window=window, windows=windows).perplexity
    if not isinstance(score, Tensor | np.ndarray | list | tuple):
        raise OptionError(
            f"score is a {type(score).__name__}; allowed: a function of the model, text, a path, "
            "or token ids"
        )
    return _on_ids(model, score, window, windows)


def _on_ids(model: PreTrainedModel, ids: Any, window: int, windows: int) -> GroupScore:
    """Return a function for the perplexity on the first windows, or rows, of ids."""
    if output_head(model) is None:
        raise EvaluationError(
            f"{type(model).__name__} has no head over its vocabulary, which the perplexity needs; "
            "give a function as score="
        )
    check_positions(model, window, f"window={window}")
    batches = token_batches(ids, max_length=window, num_samples=2**62)[:windows]
    tasks = make_tasks(model, batches, "data")
    return lambda measured: batch_perplexity(measured, tasks)
