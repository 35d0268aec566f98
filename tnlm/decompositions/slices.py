"""A format for several matrices of one shape that are the slices of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, Shape
from tnlm.decompositions.stack_tucker import SLICE
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.metrics.stacked import Stacked
from tnlm.tensors.contraction import chain
from tnlm.tensors.network import Factors, Network


class Slices(Format[Any]):
    """Takes all matrices of a stack ``(count, out, in)`` as one tensor, in a shared network.

    Args:
        inner: the format of the tall matrix ``(count * out, in)``.
        count: how many matrices there are.
    """

    def __init__(self, inner: Format[Any], count: int) -> None:
        """Wrap a format."""
        self.inner, self.count, self.spec = inner, count, inner.spec
        self.__dict__.update(name=inner.name, title=inner.title, kinds=inner.kinds)

    def network(self, shape: Shape, spec: Any) -> Network:
        """Return the network of all matrices of a shape."""
        return self.inner.network(self._tall(shape), spec)

    def allows(self, shape: Shape, spec: Any, ceiling: Ceiling) -> bool:
        """Return whether all together are within what each may cost."""
        network = self.network(shape, spec)
        return self._all(ceiling).params >= network.params and macs_of_one(network) <= ceiling.macs

    def fit(self, weight: Tensor, metric: Metric, spec: Any) -> Factors:
        """Return the factors of all matrices."""
        return self.inner.fit(*whole(weight, metric), spec)

    def candidates(self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling) -> Any:
        """Return the specs within what all matrices may cost together."""
        return self.inner.candidates(self._tall(shape), options, self._all(ceiling))

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[Any]:
        """Return small specs by which all matrices together are within the tolerance."""
        return self.inner.within(*whole(weight, metric), options, tolerance)

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[Any]) -> list[float]:
        """Return the relative errors of all matrices together."""
        return self.inner.errors(*whole(weight, metric), specs)

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[Any, float]]:
        """Return specs of increasing size with their errors."""
        return self.inner.curve(*whole(weight, metric), options, macs)

    def _tall(self, shape: Shape) -> Shape:
        return self.count * shape[0], shape[1]

    def _all(self, ceiling: Ceiling) -> Ceiling:
        return Ceiling(self.count * ceiling.params, self.count * ceiling.macs)


def whole(weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """Return the tall matrix of a stack ``(count, out, in)``, and its metric.

    Example:
        >>> import torch
        >>> two = Several([Metric, Metric], [1.0, 3.0])
        >>> tall, metric = whole(torch.ones(2, 1, 1), two)
        >>> tall.shape, metric.norm(tall)
        (torch.Size([2, 1]), 2.0)
    """
    count, rows, _ = weight.shape
    return weight.flatten(0, 1), Stacked.of(Several.of(metric, count), rows)


def macs_of_one(network: Network) -> int:
    """Return the multiply-adds of one slice of a shared network."""
    return chain(one_slice(network)).macs


def one_slice(network: Network) -> Network:
    """Return the network of one slice, which shares the factors that number none."""
    return replace(network, sizes={**network.sizes, SLICE: 1})
