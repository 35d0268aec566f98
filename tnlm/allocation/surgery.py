"""LLM Surgeon's allocation: every matrix keeps the rows and columns that all shots left it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import reprice, stay_dense
from tnlm.decompositions.base import from_dict
from tnlm.metrics.metric import Metric
from tnlm.metrics.named.surgery import Operated
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target


class Surgery(Allocation):
    """Keep what the surgeon kept; the budget was met across all matrices by one threshold."""

    name = "surgery"
    title = "rows and columns of least loss across all matrices, in several shots (LLM Surgeon)"
    units = ("params",)
    formats = frozenset({"submatrix"})
    metric = "surgery"
    takes_sizes = False
    limits_macs = False
    repeats = ("allocation", "keep", "keep_targets", "shots")

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Return the sizes that each matrix was left."""
        structure = problem.formats[0]

        def layer(target: Target, weight: Tensor, metric: Metric) -> LayerPlan:
            dense = stay_dense(target, weight, "none of its rows and columns was removed")
            if not isinstance(metric, Operated) or metric.core.shape == weight.shape:
                return dense
            rows, columns = metric.core.shape
            spec = {"rows": rows, "columns": columns}
            made = replace(dense, format=structure.name, spec=spec, note="")
            error = None
            if problem.predict:
                spec_of = from_dict(structure.spec, spec)
                error = structure.errors(weight, metric, [spec_of])[0]
            return replace(reprice(target, weight, made), error=error)

        return [decided for _, decided in problem.map(layer)]


ALLOCATION = Surgery()
