"""Whitens a reshaped matrix mode by mode, so that plain decompositions apply under a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from tnlm.decompositions.base import as_tensor
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.contraction import pairwise
from tnlm.tensors.network import Factors, Network

EXACT = 1e-12
"""A relative error this small is rounding."""

Decompose = Callable[[Tensor], Factors]
S = TypeVar("S")


def is_plain(metric: Metric) -> bool:
    """Return whether a metric is the Frobenius norm, for which closed forms need no refinement."""
    return metric.separable and metric.outputs is None and metric.inputs is None


def network_sides(network: Network, metric: Metric) -> list[Side | None]:
    """Return the side of every open mode of a network, outputs first."""
    out, inp = ([network.sizes[mode] for mode in modes] for modes in (network.out, network.inp))
    return metric.modes(out, inp)


def whiten(tensor: Tensor, sides: Sequence[Side | None]) -> Tensor:
    """Multiply every mode of a tensor by the root of its side."""
    for mode, side in enumerate(sides):
        if side is not None:
            tensor = side.scale(tensor.movedim(mode, -1)).movedim(-1, mode)
    return tensor


def unwhiten(network: Network, factors: Factors, sides: Sequence[Side | None]) -> Factors:
    """Divide every open mode in the factors of a whitened tensor by the root of its side."""
    found = dict(factors)
    for mode, side in zip(network.out + network.inp, sides, strict=True):
        for name, modes in network.factors.items():
            if side is not None and mode in modes:
                axis = modes.index(mode)
                found[name] = side.unscale(found[name].movedim(axis, -1)).movedim(-1, axis)
    return found


def rebuild(network: Network, factors: Factors) -> Tensor:
    """Return the matrix of a network's factors."""
    table = pairwise(network)([factors[name] for name in network.factors])
    return table.reshape(network.shape)


def reshaped(network: Network, weight: Tensor) -> Tensor:
    """Return a weight in float64, with one axis per open mode of a network."""
    return as_tensor(weight, [network.sizes[mode] for mode in network.out + network.inp])


def closed_form(
    network: Network, weight: Tensor, metric: Metric, decompose: Decompose
) -> tuple[Factors, float]:
    """Return the better of two closed forms, with its relative error in the metric.

    One decomposes the matrix itself. The other decomposes the whitened matrix, which is optimal if
    the metric is separable over the modes.

    Args:
        network: network of the factors.
        weight: ``(out, in)``.
        metric: how the error is measured; the Frobenius norm needs only the first form.
        decompose: returns the factors nearest to a tensor with one axis per open mode.
    """
    tensor = reshaped(network, weight)
    factors = decompose(tensor)
    error = metric.relative(weight, rebuild(network, factors))
    if is_plain(metric) or error <= EXACT:
        return factors, error
    sides = network_sides(network, metric)
    whitened = unwhiten(network, decompose(whiten(tensor, sides)), sides)
    other = metric.relative(weight, rebuild(network, whitened))
    return (whitened, other) if other < error else (factors, error)


def grown(spec_at: Callable[[float], S], error_of: Callable[[S], float], tolerance: float) -> S:
    """Tighten a bound on the tails until the error is within the tolerance; return the spec.

    Args:
        spec_at: returns the spec for a bound on the whitened tails; exact as the bound nears zero.
        error_of: returns the relative error of a spec in the metric.
        tolerance: relative error allowed.
    """
    bound = tolerance
    spec = spec_at(bound)
    while (error := error_of(spec)) > tolerance and bound > EXACT:
        bound *= 0.9 * tolerance / error
        spec = spec_at(bound)
    return spec
