"""What a user's metric says of a model, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from tnlm.errors import EvaluationError
from tnlm.evaluation.number import finite

Measure = Callable[[PreTrainedModel], Any]
"""Takes a model, and returns a number, or a mapping from names to numbers."""


def measure(model: PreTrainedModel, metric: Measure, name: str = "value") -> dict[str, float]:
    """Return what a metric gives, as named finite numbers.

    Args:
        model: what is measured.
        metric: returns a number or a mapping from names to numbers.
        name: what a single number is called.

    Raises:
        EvaluationError: if it gives no numbers, or one that is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> measure(LlamaForCausalLM(tiny), lambda model: model.num_parameters(), "size")
        {'size': 1176.0}
    """
    found = metric(model)
    values = dict(found) if isinstance(found, Mapping) else {name: found}
    if not values:
        raise EvaluationError("the metric gave an empty mapping; it must give one number at least")
    return {str(key): finite(value, f"the metric {key!r}") for key, value in values.items()}
