"""A format for several matrices of one shape that take it in the same size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, Shape
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.tensors.network import Factors, Network


class Alike(Format[Any]):
    """Takes one spec for all matrices of a stack ``(count, out, in)``, whose errors add up.

    Args:
        inner: the format of one matrix.
    """

    def __init__(self, inner: Format[Any]) -> None:
        """Wrap a format."""
        self.inner, self.spec = inner, inner.spec
        self.__dict__.update(name=inner.name, title=inner.title, kinds=inner.kinds)

    def network(self, shape: Shape, spec: Any) -> Network:
        """Return the network of one matrix."""
        return self.inner.network(shape, spec)

    def fit(self, weight: Tensor, metric: Metric, spec: Any) -> Factors:
        """Return every factor of all matrices, stacked."""
        several = Several.of(metric, len(weight))
        found = [self.inner.fit(one, part, spec) for one, part, _ in several.each(weight)]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def candidates(self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling) -> Any:
        """Return the specs that one matrix may have, which depend on its shape alone."""
        return self.inner.candidates(shape, options, ceiling)

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[Any]:
        """Return the specs, among those of single matrices, that all together are within."""
        found: list[Any] = []
        for one, part, _ in Several.of(metric, len(weight)).each(weight):
            found += [s for s in self.inner.within(one, part, options, tolerance) if s not in found]
        errors = self.errors(weight, metric, found)
        return [s for s, error in zip(found, errors, strict=True) if error <= tolerance]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[Any]) -> list[float]:
        """Return the root of the summed squared errors over that of the summed squared norms."""
        total, sums = 0.0, [0.0] * len(specs)
        for one, part, energy in Several.of(metric, len(weight)).each(weight):
            total += energy
            errors = self.inner.errors(one, part, specs) if energy and specs else ()
            for index, error in enumerate(errors):
                sums[index] += energy * error**2
        return [math.sqrt(each / total) if total else 0.0 for each in sums]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[Any, float]]:
        """Return the specs of the matrix that weighs most, with the errors of all."""
        several = Several.of(metric, len(weight))
        energies = [energy for _, _, energy in several.each(weight)]
        heaviest = max(range(len(energies)), key=energies.__getitem__)
        one, part = weight[heaviest], several.parts[heaviest]()
        sampled = self.inner.curve(one, part, options, macs / len(weight))
        specs = [spec for spec, _ in sampled]
        return list(zip(specs, self.errors(weight, metric, specs), strict=True))
