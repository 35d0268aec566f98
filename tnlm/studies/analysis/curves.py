"""Error against size of one matrix, in several formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Limits
from tnlm.allocation.uniform import curve_of
from tnlm.decompositions.base import Format, to_dict
from tnlm.metrics.metric import Metric
from tnlm.targets.base import Target


@dataclass(frozen=True)
class CurveRow:
    """One matrix in one format at one size.

    Attributes:
        name: name of the target.
        format: name of the format.
        spec: sizes of the format.
        metric: norm of the error: ``"identity"``, or ``"input"`` on data.
        params: parameters stored.
        keep: ``params`` over the parameters of the matrix.
        macs: multiply-adds per token.
        error: relative error in the metric.
        damage: fraction of the parameters removed, times the stable rank of the weight.
    """

    name: str
    format: str
    spec: Mapping[str, Any]
    metric: str
    params: int
    keep: float
    macs: int
    error: float
    damage: float


def curve_rows(
    target: Target,
    weight: Tensor,
    formats: Sequence[Format[Any]],
    metrics: Mapping[str, Metric],
    stable_rank: float,
) -> Iterator[CurveRow]:
    """Yield the errors of a matrix in every suitable format, by size, in every metric.

    Sizes that are larger or slower than the matrix itself are left out.

    Args:
        target: the matrix.
        weight: ``(out, in)``.
        formats: the formats; those for other kinds of targets are ignored.
        metrics: norms of the error, by name.
        stable_rank: stable rank of the weight.

    Raises:
        OptionError: if a format is not possible; names the target.

    Source: Xu 2026, arXiv 2604.18085, for the damage: compression ratio times stable rank.

    Example:
        >>> import torch
        >>> from tnlm.decompositions import get_format
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> target = MatrixTarget("up", "up", (4, 4))
        >>> rows = curve_rows(target, torch.eye(4), [get_format("low-rank")],
        ...                   {"identity": Metric()}, stable_rank=4.0)
        >>> [(row.spec["rank"], row.params, round(row.error**2, 2), row.damage) for row in rows]
        [(1, 7, 0.75, 2.25), (2, 12, 0.5, 1.0), (3, 15, 0.25, 0.25)]
    """
    macs = target.most_macs(1.0)
    for structure in formats:
        if target.kind not in structure.kinds:
            continue
        for name, metric in metrics.items():
            found = curve_of(target, weight, metric, structure, Limits(keep=1.0), macs)
            for spec, network, error in found:
                cost = target.cost(network, weight.element_size())
                if cost.params > target.most or cost.macs > macs:
                    continue
                keep = cost.params / target.params
                yield CurveRow(
                    target.name,
                    structure.name,
                    to_dict(spec),
                    name,
                    cost.params,
                    keep,
                    cost.macs,
                    error,
                    (1.0 - keep) * stable_rank,
                )
