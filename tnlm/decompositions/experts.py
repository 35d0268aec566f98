"""Experts: a block of routed experts keeps some of them; the router follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, Shape
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors, Network


@dataclass(frozen=True)
class ExpertsSpec:
    """How many experts are kept."""

    experts: int


class Experts(Format[ExpertsSpec]):
    """Keep the experts that weigh most in the metric; the others go, and their tokens elsewhere.

    The matrix is a column of ones ``(experts, 1)``; the metric's row side holds what an expert's
    removal costs, so that the squared error of a spec is the cost of all that it drops. The experts
    kept stay as they are. That is REAP's rule if the weights are squares of its scores.

    Source: REAP, Lasby et al. 2025, arXiv 2510.13999.

    Example:
        >>> import torch
        >>> from tnlm.metrics.sides import Side
        >>> scores = Metric(outputs=Side(torch.tensor([4.0, 1.0, 9.0])))
        >>> FORMAT.fit(torch.ones(3, 1), scores, ExpertsSpec(experts=2))["kept"]
        tensor([0, 2])
    """

    name = "experts"
    title = "fewer experts in a mixture"
    spec = ExpertsSpec
    metrics = frozenset({"experts"})
    kinds = frozenset({"experts"})

    def network(self, shape: Shape, spec: ExpertsSpec) -> Network:
        """Return the one factor of kept rows, whose parameters count experts."""
        if spec.experts > shape[0]:
            raise RankError(f"experts={spec.experts}; {shape[0]} experts allow 1 to {shape[0]}")
        return Network({"rows": "ko"}, "k", "o", {"k": spec.experts, "o": shape[1]})

    def fit(self, weight: Tensor, metric: Metric, spec: ExpertsSpec) -> Factors:
        """Return ``kept``, sorted numbers of experts, and ``rows``, which are ones."""
        kept = _order(weight, metric)[len(weight) - spec.experts :].sort().values
        return {"kept": kept, "rows": weight.detach().double()[kept]}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], budget: Ceiling
    ) -> Sequence[ExpertsSpec]:
        """Return the number asked for, or the largest within the budget."""
        most = int(min(budget.params, shape[0]))
        count = options.get("experts") or most
        return [ExpertsSpec(count)] if max(1, budget.least) <= count <= most else []

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[ExpertsSpec]:
        """Return the smallest number whose error is within the tolerance."""
        found = self.curve(weight, metric, options, 0.0)
        return [spec for spec, error in found if error <= tolerance][:1] or [
            ExpertsSpec(len(weight))
        ]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[ExpertsSpec, float]]:
        """Return every number of experts with its error; none takes more multiply-adds."""
        counts = [options["experts"]] if options.get("experts") else range(1, len(weight))
        specs = [ExpertsSpec(count) for count in counts]
        return list(zip(specs, self.errors(weight, metric, specs), strict=True))

    def reconstruct(self, shape: Shape, spec: ExpertsSpec, factors: Factors) -> Tensor:
        """Return the column with zeros for the experts that are gone."""
        table = factors["rows"].new_zeros(shape)
        table[factors["kept"]] = factors["rows"]
        return table


def _order(weight: Tensor, metric: Metric) -> Tensor:
    """Return all experts, that of least weight first; of equals the earlier."""
    side = metric.outputs
    ones = weight.new_ones(len(weight)).double()
    cost = ones if side is None else side.values if side.is_diagonal else side.values.diagonal()
    return cost.argsort(stable=True)


FORMAT = Experts()
