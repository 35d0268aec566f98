"""Metrics from Fisher information estimated by the gradients of a LoRA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tnlm.metrics.measure import LORA, Gathered, Measure, effect
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.linalg import tails

KEPT = "keep"
"""The gatherer's option that trains a LoRA and keeps it."""


def _inputs(of: Gathered, damping: float) -> Metric:
    return Metric(inputs=Side(of("lora_inputs"), damping))


def _both(of: Gathered, damping: float) -> Metric:
    outputs = Side(of("lora_outputs"), damping)
    # Divided so that the scale counts once, not twice.
    return Metric(outputs, Side(of("lora_inputs").double() / outputs.mean, damping))


class KeptLora(Metric):
    """The columns' weights, of a matrix to which a LoRA was added that stays as it is.

    Low rank keeps the LoRA's own factors, and spends the rest of its rank on the matrix without it.

    Args:
        inputs: the weighting of the columns.
        A: ``(r, in)``.
        B: ``(out, r)``, scaled.

    Example:
        >>> import torch
        >>> A, B = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0], [2.0], [0.0]])
        >>> metric = KeptLora(Side(torch.ones(3)), A, B)
        >>> left, right = metric.low_rank(torch.diag(torch.tensor([3.0, 1.0, 5.0])) + B @ A, 2)
        >>> (left @ right).round(decimals=6).tolist()
        [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 5.0]]
    """

    def __init__(self, inputs: Side, A: Tensor, B: Tensor) -> None:
        """Store the LoRA; see the class for the arguments."""
        super().__init__(inputs=inputs)
        self.A, self.B = A.double(), B.double()

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return by how much each rank lowers the squared error of :meth:`low_rank`.

        The entry is negative at the first rank that keeps the LoRA if the sum was fitted better.
        """
        full = min(weight.shape)
        own = min(len(self.A), full)
        whole = tails(super().spectrum(weight))
        rest = tails(super().spectrum(weight.double() - self.B @ self.A))
        left = torch.cat([whole[: min(own + 1, full)], rest[1 : full - own], whole[-1:]])
        return left[:-1] - left[1:]

    def low_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors that hold the LoRA's; without them if the rank is not larger, or full."""
        own = rank - len(self.A)
        if own < 1 or rank >= min(weight.shape):
            return super().low_rank(weight, rank)
        left, right = super().low_rank(weight.double() - self.B @ self.A, own)
        return torch.cat([left, self.B], 1), torch.cat([right, self.A])


def _kept(of: Gathered, damping: float) -> Metric:
    return KeptLora(Side(of("lora_inputs"), damping), of("lora_A"), of("lora_B"))


lora = partial(Measure, importance=effect("lora_inputs"), needs=frozenset({LORA}))

MEASURES = (
    lora(
        "lora-fisher",
        "columns weighted by their Fisher information, estimated from a LoRA's gradients",
        _inputs,
    ),
    lora(
        "lora-taylor",
        "columns weighted by squared gradient times weight, estimated from a LoRA's gradients",
        _inputs,
        gathering={LORA: {"kind": "taylor"}},
    ),
    lora(
        "lora-both",
        "rows and columns weighted by their Fisher information, estimated from a LoRA's gradients",
        _both,
        gathering={LORA: {"outputs": True}},
    ),
    lora(
        "lora-kept",
        "columns as in lora-fisher, while the LoRA is trained; it stays in the factors",
        _kept,
        gathering={LORA: {KEPT: True}},
    ),
)
