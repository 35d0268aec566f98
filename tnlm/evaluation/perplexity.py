"""Perplexity of a causal language model, under one fixed and named protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tnlm.calibration.text import read_text, tokenize
from tnlm.errors import CalibrationError, EvaluationError, OptionError
from tnlm.evaluation.mode import check_positions, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with the protocol that it was measured under.

    Args:
        perplexity: ``exp(loss)``.
        loss: mean negative log-likelihood, in nats, of a predicted token.
        window: tokens in a window.
        windows: windows that were measured, which may be fewer than were asked for.
        tokens: predicted tokens that the loss averages: ``windows * (window - 1)``.

    Example:
        >>> print(Perplexity(perplexity=25.31, loss=3.23, window=512, windows=16, tokens=8176))
        perplexity 25.31 (16 windows of 512 tokens, 8176 predictions)
    """

    perplexity: float
    loss: float
    window: int
    windows: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} ({self.windows} windows of {self.window} tokens, "
            f"{self.tokens} predictions)"
        )


def perplexity(
    model: PreTrainedModel,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    window: int = 512,
    windows: int = 16,
) -> Perplexity:
    """Measure a causal model's perplexity on the first non-overlapping windows of a text.

    The text is tokenised once, without special tokens. The result is the exponential of the mean
    token loss, in float32, over all ``window - 1`` predictions of each window.

    Args:
        model: a causal language model, left as it was.
        text: the text, or the path of a text or ``.jsonl`` file (``text`` fields are joined by
            blank lines); a string that names an existing file is read.
        tokenizer: the model's own.
        window: tokens in a window, at least 2.
        windows: windows to measure; a shorter text gives fewer, and the result counts them.
    """
    ids, losses = window_losses(model, text, tokenizer, window=window, windows=windows)
    tokens = len(ids) * (window - 1)
    mean = math.fsum(losses) / tokens
    if mean > math.log(1e300):
        raise EvaluationError(f"the mean loss is {mean:.0f}: its perplexity is not a float")
    return Perplexity(math.exp(mean), mean, window, len(ids), tokens)


def window_losses(
    model: PreTrainedModel,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    window: int,
    windows: int,
    progress: bool = False,
) -> tuple[Tensor, list[float]]:
    """Return the windows ``(windows found, window)`` and the summed loss of each.

    The arguments are those of :func:`perplexity`; ``progress`` shows a bar.
    """
    if windows < 1:
        raise OptionError(f"windows={windows}, but at least 1 is needed")
    if window < 2:
        raise EvaluationError(f"window={window} predicts nothing; use at least 2")
    check_positions(model, window, f"window={window}")
    ids = _first_windows(model, text, tokenizer, window, windows)
    rows = tqdm(ids, desc="windows", disable=not progress)
    with evaluating(model):
        return ids, [_window_loss(model, row, index) for index, row in enumerate(rows)]


def _first_windows(
    model: PreTrainedModel,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int,
    windows: int,
) -> Tensor:
    """Tokenise the text and return ids of shape ``(windows found, window)``."""
    if tokenizer is None:
        raise EvaluationError("perplexity needs the model's tokenizer, got None")
    source = text if isinstance(text, Path) or _is_file(text) else None
    try:
        content = str(text) if source is None else read_text(source)
    except CalibrationError as err:
        raise EvaluationError(str(err)) from err
    ids = tokenize(content, tokenizer)
    if len(ids) < window:
        hint = "; no file has that name" if source is None and len(content) < 256 else ""
        raise EvaluationError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}{hint}; "
            "use a shorter window or more text"
        )
    ids = ids[: min(windows, len(ids) // window) * window].reshape(-1, window)
    size = model.config.get_text_config().vocab_size
    if int(ids.max()) >= size:
        raise EvaluationError(
            f"the tokenizer gives the id {int(ids.max())}, but the model knows {size} tokens; "
            "use the tokenizer that belongs to the model"
        )
    return ids


def _is_file(name: str) -> bool:
    """Whether a string names a file; a text may be longer than the system lets a name be."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def _window_loss(model: PreTrainedModel, ids: Tensor, index: int) -> float:
    """Sum the losses of all predictions in the window ``(window,)`` with this number."""
    ids = ids.to(model.device)
    logits = getattr(model(input_ids=ids[None], use_cache=False), "logits", None)
    if logits is None or logits.shape[:2] != (1, len(ids)):
        raise EvaluationError(
            f"{type(model).__name__} gives no logits for every token; perplexity needs a causal "
            "language model"
        )
    losses = F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none")
    loss = float(losses.double().sum())
    if not math.isfinite(loss):
        raise EvaluationError(
            f"the loss of window {index} (from 0) is {loss}: the model's output is not finite "
            "there; look for NaN or infinite weights"
        )
    return loss
