"""Metrics from Fisher information estimated by the gradients of a LoRA."""

from __future__ import annotations

from functools import partial

from tnlm.metrics.measure import LORA, Gathered, Measure, effect
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side


def _inputs(of: Gathered, damping: float) -> Metric:
    return Metric(inputs=Side(of("lora_inputs"), damping))


def _both(of: Gathered, damping: float) -> Metric:
    outputs = Side(of("lora_outputs"), damping)
    # Divided so that the scale counts once, not twice.
    return Metric(outputs, Side(of("lora_inputs").double() / outputs.mean, damping))


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
)
