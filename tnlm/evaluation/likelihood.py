"""Log-likelihoods of continuations, in batches of like length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tnlm.errors import EvaluationError
from tnlm.evaluation.encoding import Encoded, check_vocabulary
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.prefix import Batch, Past, batches, can_share
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
    model share one pass, as the letters of one question do. Choices of several tokens after one
    question share the pass over it, if the model can and they fill half a batch.

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
    scored = {
        tokens: max(len(pairs[index].continuation) for index in indices)
        for tokens, indices in shared.items()
    }
    answers: dict[int, Answer] = {}
    with evaluating(model):
        todo, past = batches(scored, batch_size, share=True), Past(model)
        if any(batch.prefix for batch in todo) and not can_share(model):
            todo = batches(scored, batch_size, share=False)
        for batch in tqdm(todo, desc="likelihoods", disable=not progress):
            for row, tokens in zip(_logits(model, batch, past), batch.inputs, strict=True):
                end = len(tokens) - batch.prefix
                for index in shared[tokens]:
                    continuation = pairs[index].continuation
                    foreseen = row[end - len(continuation) : end]
                    answers[index] = _answer(foreseen, continuation, names[index])
    return [answers[index] for index in range(len(pairs))]


def _logits(model: PreTrainedModel, batch: Batch, past: Past) -> Tensor:
    """Return logits after the prefix of sequences, which are padded on the right.

    No causal model sees the padding from the left.
    """
    rests = [tokens[batch.prefix :] for tokens in batch.inputs]
    ids = torch.zeros(len(rests), max(map(len, rests)), dtype=torch.int64)
    for row, tokens in zip(ids, rests, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    options: dict[str, Any] = {"use_cache": False}
    if batch.prefix:
        known = past.of(batch.inputs[0][: batch.prefix], len(rests))
        options = {"use_cache": True, **known}
    output = model(input_ids=ids.to(model.device), **options)
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
