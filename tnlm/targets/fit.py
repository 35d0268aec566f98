"""Fits one matrix as planned, and stores the factors in a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, build, network_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Format, from_dict
from tnlm.errors import CalibrationError, OptionError
from tnlm.layers.arranged import filled
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.tensors.gauge import expand, fix
from tnlm.tensors.network import Factors, Network
from tnlm.tensors.precision import as_stored, is_half, rounded, widened


def fit_matrix(
    entry: Entry,
    weight: Tensor,
    bias: Tensor | None,
    metric: Metric,
    layer: LayerPlan,
    output: Tensor | None = None,
    factors: Factors | None = None,
) -> tuple[nn.Module, float]:
    """Fit one matrix as planned.

    Args:
        entry: its checkpoint entry.
        weight: the matrix to approximate, ``(out, in)``.
        bias: the bias of the matrix, if any.
        metric: metric of the error.
        layer: the plan's decision.
        output: the mean output ``(out,)`` to match, for a metric with a mean; by default, that of
            ``weight``.
        factors: all full factors, if they are already fitted.

    Returns:
        The module, on the weight's device and in its dtype, and the relative error in the metric.
        In half precision, the error is that of the stored values; otherwise, that of the float64
        factors, which differ only by rounding. A metric with a mean moves the mean error into the
        bias.

    Raises:
        ModelError: if a value is too large for the weight's dtype.
    """
    if layer.format is None:
        return filled(weight, bias), 0.0
    network = network_of(entry)
    # Built before fitting: allocating long-lived tensors first keeps the heap compact.
    module = build(entry | {"padding_idx": None}, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        kept, rebuilt = fit_factors(network, weight, metric, layer, factors)
        error = metric.relative(weight, rebuilt)
        if metric.mean is not None:
            wanted = weight.double() @ metric.mean if output is None else output
            shift = wanted - rebuilt @ metric.mean
            shift = shift if bias is None else bias.double() + shift
            bias = rounded(shift, weight.dtype, f"the bias of {layer.name}")
        module.store(kept, bias)  # type: ignore[operator]
    return module, error


def fit_factors(
    network: Network,
    weight: Tensor,
    metric: Metric,
    layer: LayerPlan,
    factors: Factors | None = None,
) -> tuple[Factors, Tensor]:
    """Return the factors to store, in the weight's dtype, and the float64 matrix they give.

    In half precision, the matrix is that of the stored values. See :func:`fit_matrix` for the
    arguments.
    """
    structure = get_format(str(layer.format))
    spec = from_dict(structure.spec, layer.spec)
    stored = fix(network, factors or _fitted(structure, weight, metric, spec, layer.name))
    kept = as_stored(network, stored, weight.dtype, layer.name)
    seen = kept if is_half(weight.dtype) else stored
    return kept, structure.reconstruct(layer.shape, spec, expand(network, widened(seen)))


def _fitted(
    structure: Format[Any], weight: Tensor, metric: Metric, spec: Any, name: str
) -> Factors:
    """Return the factors of a format's fit, whose errors then name the layer."""
    try:
        return structure.fit(weight, metric, spec)
    except (OptionError, CalibrationError) as error:
        raise type(error)(f"{name}: {error}", argument=error.arguments) from error
