"""Calls a user's score of a model, and checks what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from tnlm.errors import EvaluationError
from tnlm.evaluation.number import finite

Score = Callable[[PreTrainedModel], Any]
"""Takes a model; returns a number, or a mapping from names to numbers."""


def named_scores(model: PreTrainedModel, score: Score, name: str = "value") -> dict[str, float]:
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
