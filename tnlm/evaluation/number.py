"""Checks that a measured value is a finite number."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tnlm.errors import EvaluationError

LARGEST = math.log(1e300)
"""The largest mean loss whose exponential certainly fits in a float."""


def exponential(loss: float) -> float:
    """Return the perplexity of a mean loss, in nats.

    Raises:
        EvaluationError: if it is too large for a float.

    Example:
        >>> exponential(0.0)
        1.0
    """
    if loss > LARGEST:
        raise EvaluationError(f"the mean loss is {loss:.0f}: its perplexity overflows a float")
    return math.exp(loss)


def finite(value: Any, what: str) -> float:
    """Return a value as a finite float.

    Args:
        value: a number, or a tensor with one element.
        what: its name in an error.

    Raises:
        EvaluationError: if the value is not a number, or not finite.

    Example:
        >>> finite(float("nan"), "the metric of the whole model")
        Traceback (most recent call last):
        tnlm.errors.EvaluationError: the metric of the whole model is nan, not a finite number
    """
    if isinstance(value, str):  # float() would parse it
        raise EvaluationError(f"{what} is {value!r}; it must be a number")
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"{what} is a {type(value).__name__}; it must be a number") from error
    if not math.isfinite(number):
        raise EvaluationError(f"{what} is {number}, not a finite number")
    return number
