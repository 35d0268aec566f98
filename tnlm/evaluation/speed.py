"""Decoding speed of several models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.cache import cache_name, cache_of
from tnlm.evaluation.mode import check_positions, evaluating
from tnlm.targets.ends import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decode_rates(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 32,
    repeats: int = 3,
) -> dict[str, float]:
    """Measure tokens per second of greedy decoding at batch 1 with a KV cache.

    The models alternate, so that drift of the machine affects all alike. Only the steps after the
    prompt are timed. Each rate is the median over ``repeats``.

    Args:
        models: causal language models by name, left unchanged.
        prompt_tokens: length of the random prompt, the same for all models.
        new_tokens: steps timed in each repeat.
        repeats: repeats of each model, after one that is not counted.
    """
    options = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in options.items():
        if value < 1:
            raise OptionError(f"{name}={value}, but at least 1 is needed", argument=name)
    if not models:
        raise EvaluationError("no models to measure; give at least one by name")
    length = prompt_tokens + new_tokens
    for model in models.values():
        check_positions(
            model, length, f"prompt_tokens + new_tokens = {length}", ("prompt_tokens", "new_tokens")
        )
    vocabulary = min(vocabulary_of(m) or 1 for m in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)
    rates: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for turn in range(repeats + 1):
            for name, model in models.items():
                rate = new_tokens / timed_decoding(model, prompt, new_tokens)[1]
                if turn > 0:  # the first turn is a warm-up
                    rates[name].append(rate)
    return {name: statistics.median(values) for name, values in rates.items()}


def timed_decoding(model: PreTrainedModel, prompt: Tensor, steps: int) -> tuple[float, float]:
    """Time the pass over a prompt ``(1, length)``, and the ``steps`` greedy steps after it.

    Args:
        model: in eval mode, without gradients.
        prompt: token ids, on any device.
        steps: number of tokens to decode.

    Returns:
        The seconds for each of the two.
    """
    named = cache_name(model)
    prompt = prompt.to(model.device)
    _synchronize(model.device)
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True)
    _synchronize(model.device)
    middle = time.perf_counter()
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        kept = {named: cache_of(model, output)}
        output = model(input_ids=token, use_cache=True, **kept)
    _synchronize(model.device)
    return middle - start, time.perf_counter() - middle


def _synchronize(device: torch.device) -> None:
    """Wait for a CUDA device to finish; calls on other devices are synchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
