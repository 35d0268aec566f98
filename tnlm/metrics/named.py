"""Named ways to measure an error: which statistics each needs, and the metric made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.errors import OptionError, did_you_mean
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side

INPUTS, GRADIENTS, FISHER, LORA = "inputs", "gradients", "fisher", "lora"
MOVEMENT = "movement"
"""Kinds of statistics: of the inputs, of output gradients, of weight gradients by example, of the
same as a LoRA's gradients tell of them, and of where weights move while they are pruned."""

Gathered = Callable[[str], Tensor]
"""Returns one statistic of a matrix by name: moment, mean, magnitude, gradient, fisher,
lora_inputs, lora_outputs, movement."""


@dataclass(frozen=True)
class Measure:
    """A way to measure the error of a matrix.

    Attributes:
        name: what users write as ``metric=``.
        title: one line for tables.
        needs: the kinds of statistics it is made from.
        build: makes the metric, given the statistics of one matrix and the damping.
        damping: share of an input moment that is replaced by its mean diagonal, unless asked.
        adds_bias: the mean error is put into a bias.
    """

    name: str
    title: str
    needs: frozenset[str]
    build: Callable[[Gathered, float], Metric]
    damping: float = 1e-6
    adds_bias: bool = False

    @property
    def is_elementwise(self) -> bool:
        """Whether every entry has a weight of its own, so that no closed form exists."""
        return self.name == "fisher-elements"


GRADIENT_SHRINK = 0.3
"""Share of an output-gradient moment that is replaced by its mean diagonal (LEMS's choice)."""


CONSTANT = 1e-12
"""An input is constant if its variance is at most this part of its mean square."""


def _covariance(of: Gathered, damping: float) -> Metric:
    mean, moment = of("mean").double(), of("moment").double()
    centered = moment - torch.outer(mean, mean)
    # What rounding leaves where an input is constant is no information.
    constant = centered.diagonal() <= CONSTANT * moment.diagonal()
    centered[constant] = 0.0
    centered[:, constant] = 0.0
    return Metric(inputs=Side(centered, damping))


def _centered(of: Gathered, damping: float) -> Metric:
    return Metric(inputs=_covariance(of, damping).inputs, mean=of("mean"))


def _two_sided(of: Gathered, damping: float) -> Metric:
    return Metric(Side(of("gradient"), GRADIENT_SHRINK), Side(of("moment"), damping))


def _fisher(rows: bool, columns: bool) -> Callable[[Gathered, float], Metric]:
    def build(of: Gathered, damping: float) -> Metric:
        fisher = of("fisher").double()
        outputs = Side(fisher.mean(1), damping) if rows else None
        inputs = fisher.mean(0)
        if outputs is not None:  # the scale once, not squared
            inputs = inputs / outputs.mean
        return Metric(outputs, Side(inputs, damping) if columns else None)

    return build


def _lora_inputs(of: Gathered, damping: float) -> Metric:
    return Metric(inputs=Side(of("lora_inputs"), damping))


def _lora_both(of: Gathered, damping: float) -> Metric:
    outputs = Side(of("lora_outputs"), damping)
    # The scale once, not squared.
    return Metric(outputs, Side(of("lora_inputs").double() / outputs.mean, damping))


_ALL = (
    Measure(
        "identity", "Frobenius norm of the weight's error", frozenset(), lambda of, d: Metric()
    ),
    Measure(
        "diagonal",
        "columns weighed by the mean magnitude of their input (ASVD)",
        frozenset({INPUTS}),
        lambda of, d: Metric(inputs=Side(of("magnitude"), d)),
    ),
    Measure(
        "input",
        "error of the output on data (whitening)",
        frozenset({INPUTS}),
        lambda of, d: InputMoment(of("moment"), d),
    ),
    Measure(
        "covariance",
        "error of the output about its mean; the mean error is left as it is (LLM-ROM's code)",
        frozenset({INPUTS}),
        _covariance,
    ),
    Measure(
        "centered",
        "error of the output about its mean; the mean error goes into a bias (AFM)",
        frozenset({INPUTS}),
        _centered,
        adds_bias=True,
    ),
    Measure(
        "two-sided",
        "error of the output weighed by its effect on the loss (K-FAC)",
        frozenset({INPUTS, GRADIENTS}),
        _two_sided,
        damping=5e-2,
    ),
    Measure(
        "fisher-inputs",
        "columns weighed by their Fisher information (FWSVD)",
        frozenset({FISHER}),
        _fisher(rows=False, columns=True),
    ),
    Measure(
        "fisher-outputs",
        "rows weighed by their Fisher information",
        frozenset({FISHER}),
        _fisher(rows=True, columns=False),
    ),
    Measure(
        "fisher-both",
        "rows and columns weighed by their Fisher information",
        frozenset({FISHER}),
        _fisher(rows=True, columns=True),
    ),
    Measure(
        "fisher-elements",
        "every entry weighed by its Fisher information (TFWSVD)",
        frozenset({FISHER}),
        lambda of, d: Elementwise(of("fisher"), d),
    ),
    Measure(
        "lora-fisher",
        "columns weighed by their Fisher information, as a LoRA's gradients tell of it",
        frozenset({LORA}),
        _lora_inputs,
    ),
    Measure(
        "lora-taylor",
        "columns weighed by squared gradient times weight, as a LoRA's gradients tell of it",
        frozenset({LORA}),
        _lora_inputs,
    ),
    Measure(
        "lora-both",
        "rows and columns weighed by their Fisher information, as a LoRA's gradients tell of it",
        frozenset({LORA}),
        _lora_both,
    ),
    Measure(
        "movement",
        "columns weighed by where training moves their weights, of pruned matrices (LPAF)",
        frozenset({MOVEMENT}),
        lambda of, d: Metric(inputs=Side(of("movement"), d)),
    ),
    Measure(
        "pruned",
        "Frobenius norm of the error of pruned matrices (LPAF without weights)",
        frozenset({MOVEMENT}),
        lambda of, d: Metric(),
    ),
)

MEASURES: Mapping[str, Measure] = {measure.name: measure for measure in _ALL}
"""Every measure by name."""


def get_measure(name: str) -> Measure:
    """Return a measure by name.

    Raises:
        OptionError: for an unknown name, with the close and the allowed ones.

    Example:
        >>> sorted(get_measure("two-sided").needs)
        ['gradients', 'inputs']
    """
    if not isinstance(name, str) or name not in MEASURES:
        raise OptionError(f"unknown metric {name!r}{did_you_mean(str(name), MEASURES)}")
    return MEASURES[name]
