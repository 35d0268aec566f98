"""The rule for metrics of embeddings: how much a table affects the loss is not measured."""

from __future__ import annotations

from tnlm.allocation.base import Allocation
from tnlm.errors import OptionError
from tnlm.metrics.measure import Measure


def check_tokens(allocation: Allocation, measure: Measure) -> None:
    """Raise `OptionError` if a metric of embeddings is to share out a budget by the loss.

    Example:
        >>> from tnlm.allocation import get_allocation
        >>> from tnlm.metrics.named import get_measure
        >>> check_tokens(get_allocation("uniform"), get_measure("tokens"))
        >>> check_tokens(get_allocation("loss"), get_measure("tokens"))
        Traceback (most recent call last):
        tnlm.errors.OptionError: allocation='loss' with metric='tokens': ...
    """
    if measure.weighs_tokens and allocation.weighs_loss:
        raise OptionError(
            f"allocation={allocation.name!r} with metric={measure.name!r}: how much an embedding "
            "affects the loss is not measured; allowed: another, such as allocation='uniform'",
            argument=("allocation", "metric"),
        )
