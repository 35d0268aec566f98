"""The class of named metrics: the statistics each needs, and the norm built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tnlm.metrics.metric import Metric

INPUTS, GRADIENTS, FISHER, LORA = "inputs", "gradients", "fisher", "lora"
MOVEMENT, SLOPES, SURGERY, TOKENS = "movement", "slopes", "surgery", "tokens"
"""Kinds of statistics: inputs, output gradients, per-example weight gradients, the same estimated
from a LoRA's gradients, movement of weights during pruning, mean weight gradients, what LLM
Surgeon keeps of a matrix, and the frequencies of tokens."""

Gathered = Callable[[str], Tensor]
"""Returns one statistic of a matrix by name: moment, mean, magnitude, gradient, fisher,
lora_inputs, lora_outputs, lora_A, lora_B, movement, slope, kept_rows, kept_columns, core,
frequency."""


def effect(scale: str | None) -> Callable[[Gathered], float]:
    """Return the importance of a metric that does not depend on the loss.

    A unit of squared error in the output changes the loss by the mean squared gradient there.

    Args:
        scale: the statistic whose mean is the mean column weight of the metric; None for 1.
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
        name: the name that users write as ``metric=``.
        title: one line for tables.
        build: builds the metric from the statistics of one matrix and the damping.
        importance: returns the effect of a unit of squared error on the loss, from the statistics.
        needs: the kinds of statistics it is built from.
        gathering: options for each of `tnlm.compression.gatherers`, by name.
        damping: default fraction of an input moment replaced by its mean diagonal.
        adds_bias: whether the mean error is moved into a bias.
        elementwise: whether every entry has its own weight, so that no closed form exists.
        weighs_experts: it weighs the experts of a block, not the entries of a matrix.
        weighs_tokens: it weighs the rows of an embedding, and measures no other matrix.
        operates: it has already chosen the rows and columns that a matrix keeps.
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
    weighs_experts: bool = False
    weighs_tokens: bool = False
    operates: bool = False

    @property
    def form(self) -> str:
        """What a format must support: elementwise, separable, experts, tokens or surgery."""
        if self.elementwise:
            return "elementwise"
        if self.weighs_tokens:
            return "tokens"
        if self.operates:
            return "surgery"
        return "experts" if self.weighs_experts else "separable"
