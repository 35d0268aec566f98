"""Log-likelihoods of continuations, in batches of like length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tnlm.errors import EvaluationError
from tnlm.evaluation.encoding import Encoded, check_vocabulary
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.tasks.base import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loglikelihoods(
    model: PreTrainedModel,
    pairs: Sequence[Encoded],
    names: Sequence[str],
    *,
    window: int,
    batch_size: int,
    progress: bool = False,
) -> list[Answer]:
    """Score every continuation after its context.

    What is longer than ``window`` loses its first tokens. Pairs that put the same tokens to the
    model share one pass, as the letters of one question do.

    Args:
        model: a causal language model, left as it was.
        pairs: tokens to score.
        names: of the items they belong to, for errors.
        window: most tokens that the model is shown.
        batch_size: sequences in one pass.
        progress: show a bar.

    Raises:
        EvaluationError: naming the item whose likelihood is not finite.
    """
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        shared[(pair.context + pair.continuation)[-(window + 1) :][:-1]].append(index)
    check_vocabulary(model, [pair.context + pair.continuation for pair in pairs], names)
    inputs = sorted(shared, key=lambda tokens: (-len(tokens), tokens))
    answers: dict[int, Answer] = {}
    starts = range(0, len(inputs), batch_size)
    with evaluating(model):
        for start in tqdm(starts, desc="likelihoods", disable=not progress):
            batch = inputs[start : start + batch_size]
            logits = _logits(model, batch)
            for row, tokens in zip(logits, batch, strict=True):
                for index in shared[tokens]:
                    continuation = pairs[index].continuation
                    scored = row[len(tokens) - len(continuation) : len(tokens)]
                    answers[index] = _answer(scored, continuation, names[index])
    return [answers[index] for index in range(len(pairs))]


def _logits(model: PreTrainedModel, batch: Sequence[tuple[int, ...]]) -> Tensor:
    """Run sequences padded on the right, which no causal model sees from the left."""
    longest = max(len(tokens) for tokens in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, tokens in zip(ids, batch, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    output = model(input_ids=ids.to(model.device), use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise EvaluationError(
            f"{type(model).__name__} gives no logits for every token; likelihoods need a causal "
            "language model"
        )
    return logits


def _answer(logits: Tensor, continuation: tuple[int, ...], name: str) -> Answer:
    """Score a continuation by the logits ``(tokens, vocabulary)`` that foresee its tokens."""
    wanted = torch.tensor(continuation, device=logits.device)
    scores = logits.float().log_softmax(-1).gather(-1, wanted[:, None])
    value = float(scores.double().sum())
    if not math.isfinite(value):
        raise EvaluationError(
            f"{name}: the log-likelihood is {value}: the model's output is not finite there; look "
            "for NaN or infinite weights"
        )
    greedy = bool((logits.argmax(-1) == wanted).all())
    return Answer(loglikelihood=value, greedy=greedy, tokens=len(continuation))
