"""SVD-LLM v2's allocation: matrices of a type are cut in inverse proportion to their log loss."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import replace

from torch import Tensor

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import Uniform, decide
from tnlm.metrics.metric import Metric
from tnlm.parallel.workers import ALONE
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target

MOST = 0.99
"""The largest fraction that a matrix may lose."""


def shares(losses: list[float], keep: float) -> list[float]:
    """Return the fraction that each matrix of one type keeps.

    With L the truncation losses at the uniform fraction and g = 1 / log L, a matrix loses
    ``count * (1 - keep) * g / sum(g)``. The rule needs every L > 1, which depends on the scale of
    the data; otherwise the type is cut uniformly. No matrix loses more than 0.99 of its parameters;
    the others lose the excess in the same proportion.

    Source: SVD-LLM V2, Wang et al. 2025, arXiv 2503.12340.

    Example:
        >>> [round(share, 3) for share in shares([math.e, math.e**3], 0.8)]
        [0.7, 0.9]
    """
    if not all(loss > 1.0 for loss in losses):
        return [keep] * len(losses)
    inverse = [1.0 / math.log(loss) for loss in losses]
    most = max(MOST, 1.0 - keep)
    lost: dict[int, float] = {}
    for index in sorted(range(len(losses)), key=lambda i: losses[i]):  # the largest part first
        left = len(losses) * (1.0 - keep) - sum(lost.values())
        among = sum(g for i, g in enumerate(inverse) if i not in lost)
        lost[index] = min(left * inverse[index] / among, most)
    return [1.0 - lost[index] for index in range(len(losses))]


class TruncationLoss(Allocation):
    """Split the budget of each type (q_proj, up_proj, ...) across its blocks."""

    name = "truncation"
    title = "within a type, by inverse log truncation loss (SVD-LLM v2)"
    units = ("params",)
    formats = frozenset({"low-rank"})

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Measure the losses of a uniform cut, then cut each matrix by its share."""
        structure, limits = problem.formats[0], problem.limits

        def lost(target: Target, weight: Tensor, metric: Metric) -> float:
            extra = problem.extra(target)
            layer = decide(target, weight, metric, structure, limits, predict=False, extra=extra)
            return _loss(metric, weight, layer.spec.get("rank", min(target.shape)))

        found = replace(problem, joint=()).map(lost)
        losses = {target.name: loss for target, loss in found}
        keeps: dict[str, float] = {}
        for names in _types(losses).values():
            kept = shares([losses[name] for name in names], limits.keep)
            keeps.update(zip(names, kept, strict=True))
        decided = []
        alone = replace(problem, joint=(), progress=False, workers=ALONE)
        for target in problem.targets:
            own = replace(limits, keep=keeps[target.name])
            decided.extend(Uniform().allocate(replace(alone, targets=[target], limits=own)))
        return decided


def _loss(metric: Metric, weight: Tensor, rank: int) -> float:
    # The paper sums singular values; here C is a mean over tokens, like all statistics.
    return float(metric.spectrum(weight).clamp_min(0.0).sqrt()[rank:].sum())


def _types(names: dict[str, float]) -> dict[str, list[str]]:
    """Group names that differ only in their block numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    return groups


ALLOCATION = TruncationLoss()
