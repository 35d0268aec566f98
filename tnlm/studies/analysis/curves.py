"""Error against size of one matrix, for every format asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Limits
from tnlm.allocation.pricing import network_cost
from tnlm.allocation.uniform import name_target, options_for
from tnlm.calibration.metrics import Metric
from tnlm.decompositions.base import Format, to_dict
from tnlm.errors import OptionError
from tnlm.targets import Target


@dataclass(frozen=True)
class CurveRow:
    """What one format makes of a matrix at one size.

    Attributes:
        name: of the target.
        format: name of the format.
        spec: its sizes.
        metric: how the error is measured: ``"identity"``, or ``"input"`` on data.
        params: numbers stored.
        keep: ``params`` over those of the matrix.
        macs: multiply-adds per token.
        error: relative, in the metric.
        damage: share of the numbers removed, times the stable rank of the weight.
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
    """Yield the curve of every format that can replace a matrix, by size, under every metric.

    A format that is larger than the matrix, or does more multiply-adds, is passed over.

    Args:
        target: the matrix.
        weight: ``(out, in)``.
        formats: may include some for other kinds of targets.
        metrics: by name.
        stable_rank: of the weight.

    Raises:
        OptionError: if a format cannot be had; names the target.

    Source: the damage is that of Xu 2026, arXiv 2604.18085: compression ratio times stable rank.

    Example:
        >>> import torch
        >>> from tnlm.decompositions import get_format
        >>> target = Target("up", "up", "linear", (4, 4))
        >>> rows = curve_rows(target, torch.eye(4), [get_format("low-rank")],
        ...                   {"identity": Metric()}, stable_rank=4.0)
        >>> [(row.spec["rank"], row.params, round(row.error**2, 2), row.damage) for row in rows]
        [(1, 7, 0.75, 2.25), (2, 12, 0.5, 1.0), (3, 15, 0.25, 0.25)]
    """
    embedding = target.kind == "embedding"
    macs = math.inf if embedding else float(target.params)
    for structure in formats:
        if target.kind not in structure.kinds:
            continue
        options = options_for(target, structure, Limits(keep=1.0))
        for name, metric in metrics.items():
            try:
                sampled = structure.curve(weight, metric, options, macs)
            except OptionError as wrong:
                raise name_target(target, wrong) from wrong
            for spec, error in sampled:
                network = structure.network(target.shape, spec)
                cost = network_cost(target, network, weight.element_size())
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
