"""What a named metric is: the statistics it needs, and how a norm is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tnlm.metrics.metric import Metric

INPUTS, GRADIENTS, FISHER, LORA = "inputs", "gradients", "fisher", "lora"
MOVEMENT = "movement"
"""Kinds of statistics: of inputs, of output gradients, of weight gradients by example, of the same
as estimated from a LoRA's gradients, and of where weights move while they are pruned."""

Gathered = Callable[[str], Tensor]
"""Returns one statistic of a matrix by name: moment, mean, magnitude, gradient, fisher,
lora_inputs, lora_outputs, movement."""


def effect(scale: str | None) -> Callable[[Gathered], float]:
    """Return the importance of a metric that does not look at the loss.

    A unit of squared error in the output acts on the loss by the mean square of the gradient there.

    Args:
        scale: the statistic whose mean is the mean weight of a column in the metric; None for 1.
    """

    def importance(of: Gathered) -> float:
        squares = of("gradient")
        gradient = float((squares.diagonal() if squares.dim() == 2 else squares).mean())
        moment = float(of("moment").diagonal().mean())
        if moment <= 0:
            return 0.0
        if scale is None:
            return gradient * moment
        weight = moment if scale == "moment" else float(of(scale).mean())
        return gradient * moment / (weight or math.inf)

    return importance


@dataclass(frozen=True)
class Measure:
    """A named way to measure the error of a matrix.

    Attributes:
        name: what users write as ``metric=``.
        title: one line for tables.
        build: makes the metric, given the statistics of one matrix and the damping.
        importance: the effect on the loss of a unit of squared error, given the statistics.
        needs: the kinds of statistics that it is made from.
        gathering: how these are gathered: options for each of `tnlm.compression.gatherers`.
        damping: share of an input moment that is replaced by its mean diagonal, unless asked.
        adds_bias: the mean error is put into a bias.
        elementwise: every entry has a weight of its own, so that no closed form exists.
    """

    name: str
    title: str
    build: Callable[[Gathered, float], Metric]
    importance: Callable[[Gathered], float]
    needs: frozenset[str] = frozenset()
    gathering: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    damping: float = 1e-6
    adds_bias: bool = False
    elementwise: bool = False
