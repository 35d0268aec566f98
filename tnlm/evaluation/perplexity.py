"""Perplexity of a causal language model, under one fixed, stated protocol."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tnlm.calibration.data import text_of
from tnlm.calibration.loss import Task
from tnlm.calibration.passes import run
from tnlm.calibration.sources import first_ids
from tnlm.calibration.text import AUTO, start_token
from tnlm.errors import CalibrationError, EvaluationError, OptionError
from tnlm.evaluation.mode import check_causal, check_positions, evaluating
from tnlm.evaluation.number import exponential
from tnlm.targets.ends import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Text = str | os.PathLike[str] | Sequence[str]
"""A file, a text, or texts."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with the protocol of its measurement.

    Args:
        perplexity: ``exp(loss)``.
        loss: mean negative log-likelihood per predicted token, in nats.
        window: tokens per window.
        windows: number of windows measured, which may be fewer than requested.
        tokens: number of predicted tokens in the mean: ``windows * (window - 1)``.
        bos: whether every window starts with the tokenizer's BOS token.

    Example:
        >>> print(Perplexity(perplexity=25.31, loss=3.23, window=512, windows=16, tokens=8176))
        perplexity 25.31 (16 windows of 512 tokens, 8176 predictions)
    """

    perplexity: float
    loss: float
    window: int
    windows: int
    tokens: int
    bos: bool = False

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} ({self.windows} windows of {self.window} tokens, "
            f"{self.tokens} predictions{', after BOS' if self.bos else ''})"
        )


def perplexity(
    model: PreTrainedModel,
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    window: int = 512,
    windows: int = 16,
    bos: bool | str = AUTO,
) -> Perplexity:
    """Measure a causal model's perplexity on the first non-overlapping windows of a text.

    The text is tokenised once, without special tokens, and only as far as the windows reach. The
    result is the exponential of the mean token loss, in float32, over all ``window - 1``
    predictions of each window.

    With BOS, a window is that token and the next ``window - 1`` tokens of the text, all of which
    are predicted, the first one from BOS alone. Without BOS, a window is ``window`` tokens of the
    text, the first of which is not predicted. Both have the same length and number of predictions.

    Args:
        model: a causal language model, left unchanged.
        text: the path of a text or ``.jsonl`` file (``text`` fields are joined by blank lines), a
            list of texts, or a text. A string that looks like a file name must name a file.
        tokenizer: the model's tokenizer.
        window: tokens per window, at least 2.
        windows: most windows to measure; a short text gives fewer, and the result counts them.
        bos: whether every window starts with BOS: True, False, or ``"auto"`` to follow the
            tokenizer (Gemma's and Llama's add BOS to a text, GPT-2's does not).

    Raises:
        EvaluationError: if a file is missing, there is too little text, the tokenizer does not fit
            the model, the model is not causal, or a loss is not finite.
        OptionError: if an option is out of range.
    """
    ids, losses = window_losses(model, text, tokenizer, window=window, windows=windows, bos=bos)
    tokens = len(ids) * (window - 1)
    started = tokenizer is not None and start_token(tokenizer, bos) is not None
    mean = math.fsum(losses) / tokens
    return Perplexity(exponential(mean), mean, window, len(ids), tokens, started)


def window_losses(
    model: PreTrainedModel,
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    window: int,
    windows: int,
    bos: bool | str = AUTO,
    progress: bool = False,
) -> tuple[Tensor, list[float]]:
    """Return the windows ``(windows found, window)`` and the summed loss of each.

    The arguments are those of :func:`perplexity`; ``progress`` shows a progress bar.
    """
    if windows < 1:
        raise OptionError(f"windows={windows}, but at least 1 is needed", argument="windows")
    if window < 2:
        raise EvaluationError(
            f"window={window} predicts nothing; use at least 2", argument="window"
        )
    check_causal(model, "perplexity")
    check_positions(model, window, f"window={window}", "window")
    ids = _first_windows(model, text, tokenizer, window, windows, bos)
    rows = tqdm(ids, desc="windows", disable=not progress)
    with evaluating(model):
        return ids, [_window_loss(model, row, index) for index, row in enumerate(rows)]


def batch_perplexity(model: PreTrainedModel, tasks: Sequence[Task]) -> float:
    """Return the perplexity over all labels of batches, with sequences of any length.

    Args:
        model: causal or masked, left unchanged.
        tasks: batches with labels, from `tnlm.calibration.loss.make_tasks`.

    Raises:
        EvaluationError: if there is nothing to predict, or the perplexity overflows a float.
    """
    count = sum(task.predictions for task in tasks)
    if count == 0:
        raise EvaluationError("there is nothing to predict: every row has only one token")
    with evaluating(model):
        losses = [float(task.loss(model, run(model, task.batch))) for task in tasks]
    return exponential(math.fsum(losses) / count)


def _first_windows(
    model: PreTrainedModel,
    text: Text,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int,
    windows: int,
    bos: bool | str,
) -> Tensor:
    """Tokenise the text and return ids of shape ``(windows found, window)``."""
    if tokenizer is None:
        raise EvaluationError("perplexity needs the model's tokenizer, got None")
    start = start_token(tokenizer, bos)
    length = window - (start is not None)
    try:
        source = text_of(text)
        if source is None:
            raise CalibrationError(
                f"perplexity needs a text, not a {type(text).__name__}; give the path of a file, "
                "or texts in a list"
            )
        ids = first_ids(source, tokenizer, windows * length)
    except CalibrationError as err:
        raise EvaluationError(str(err), argument=err.arguments) from err
    if len(ids) < length:
        named = isinstance(text, str) and source.size < 256
        hint = "; no file has that name" if named else ""
        raise EvaluationError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}{hint}; "
            "use a shorter window or more text"
        )
    ids = ids[: min(windows, len(ids) // length) * length].reshape(-1, length)
    if start is not None:
        ids = F.pad(ids, (1, 0), value=start)
    size = vocabulary_of(model)
    if size is not None and int(ids.max()) >= size:
        raise EvaluationError(
            f"the tokenizer gives the id {int(ids.max())}, but the model has {size} tokens; "
            "use the model's own tokenizer"
        )
    return ids


def _window_loss(model: PreTrainedModel, ids: Tensor, index: int) -> float:
    """Return the summed loss of all predictions in the window ``(window,)`` with this index."""
    ids = ids.to(model.device)
    logits = getattr(model(input_ids=ids[None], use_cache=False), "logits", None)
    if logits is None or logits.shape[:2] != (1, len(ids)):
        raise EvaluationError(
            f"{type(model).__name__} gives no logits for every token; perplexity needs a causal "
            "language model"
        )
    if int(ids.max()) >= logits.shape[-1]:
        raise EvaluationError(
            f"window {index} (from 0) has the token id {int(ids.max())}, but the model predicts "
            f"{logits.shape[-1]} tokens; use the model's own tokenizer"
        )
    losses = F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none")
    loss = float(losses.double().sum())
    if not math.isfinite(loss):
        raise EvaluationError(
            f"the loss of window {index} (from 0) is {loss}: the model's output is not finite "
            "there; look for NaN or infinite weights"
        )
    return loss
