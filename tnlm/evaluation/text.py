"""The perplexity of a text as a task whose items are windows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tnlm.calibration.text import start_token
from tnlm.evaluation.comparison import digest, figures
from tnlm.evaluation.perplexity import Perplexity, window_losses
from tnlm.evaluation.protocol import Protocol
from tnlm.evaluation.results import TaskResult
from tnlm.evaluation.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measured(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    asked: Protocol,
) -> tuple[TaskResult, Perplexity]:
    """Measure the windows of a text; the mean loss of each window is an item's score.

    Args:
        model: a causal language model, left unchanged.
        task: the perplexity task.
        tokenizer: the model's tokenizer.
        text: a text, or the path of one.
        asked: the protocol.
    """
    ids, losses = window_losses(
        model,
        text,
        tokenizer,
        window=asked.window,
        windows=asked.windows,
        bos=asked.bos,
        progress=asked.progress,
    )
    scores = tuple({"loss": loss / (asked.window - 1)} for loss in losses)
    result = TaskResult(
        task=task.name,
        n=len(scores),
        num_fewshot=0,
        truncated=0,
        figures=figures(task.metrics, scores, asked.seed),
        right=task.right,
        items=scores,
        digest=digest(ids.tolist()),
    )
    value, loss = (result[name].value for name in ("perplexity", "loss"))
    windows, window = ids.shape
    started = start_token(tokenizer, asked.bos) is not None
    return result, Perplexity(value, loss, window, windows, windows * (window - 1), started)
