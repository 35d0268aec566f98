"""Channels: a feed-forward pair keeps some of its hidden channels, which predict the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tnlm.decompositions.base import QUIET, Ceiling, Format, Shape
from tnlm.decompositions.greedy import greedy_order
from tnlm.decompositions.nystrom import moment_of, refitted, weighted
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors, Network

STEPS = 128
"""Number of greedy steps that order all channels; each adds a batch."""

ACCURATE = 1e-8
"""Squared relative error above which that of a greedy step is accurate."""


@dataclass(frozen=True)
class ChannelsSpec:
    """The number of hidden channels to keep, a multiple of a given number."""

    width: int
    multiple: int = field(default=1, metadata=QUIET)


class Channels(Format[ChannelsSpec]):
    """Keep the channels that best predict the contribution of the others (Nyström).

    The matrix is the transposed output projection, ``(hidden, out)``; the metric's row side is the
    second moment C of the hidden activations, its column side that of the output gradients, G. With
    K the channels kept, the best projection that reads only them is ``W C[:, K] C[K, K]^-1``, and
    the squared error is the rest of W C W.T. Channels are chosen greedily: each batch takes the
    channels that reduce the error most, given those already chosen.

    The matrices that produce the hidden channels lose exactly the same rows, so that all layers
    stay plain.

    Source: the MLP module of MoDeGPT (arXiv 2408.09632), which ranks by ridge leverage scores;
    the greedy choice here is orthogonal least squares (Chen, Cowan and Grant 1991).

    Example:
        >>> import torch
        >>> from tnlm.metrics.sides import Side
        >>> copies = Side(torch.ones(4, 4))  # four channels that always agree
        >>> weight = torch.randn(4, 3)
        >>> factors = FORMAT.fit(weight, Metric(outputs=copies), ChannelsSpec(width=1))
        >>> bool(torch.allclose(factors["rows"], weight.double().sum(0, keepdim=True)))
        True
    """

    name = "channels"
    title = "fewer hidden channels in a feed-forward pair (Nyström)"
    spec = ChannelsSpec
    metrics = frozenset({"separable"})
    kinds = frozenset({"channels"})
    made_of = frozenset({"linear"})

    def network(self, shape: Shape, spec: ChannelsSpec) -> Network:
        """Return the single factor of kept rows; the layers that use it are plain."""
        if spec.width > shape[0]:
            raise RankError(
                f"width={spec.width}; {shape[0]} channels allow 1 to {shape[0]}", argument="width"
            )
        if spec.width % spec.multiple:
            raise RankError(
                f"width={spec.width}; allowed: multiples of {spec.multiple}", argument="width"
            )
        return Network({"rows": "ko"}, "k", "o", {"k": spec.width, "o": shape[1]})

    def fit(self, weight: Tensor, metric: Metric, spec: ChannelsSpec) -> Factors:
        """Return ``kept``, the sorted channel indices, and ``rows``, their new projection."""
        chosen, _ = ordered(weight, metric, spec.multiple, spec.width)
        kept = chosen[: spec.width].sort().values
        return {"kept": kept, "rows": refitted(weight, moment_of(weight, metric), kept)}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[ChannelsSpec]:
        """Return the given width, or the largest within the budget for the rows."""
        multiple = options.get("multiple", 1)
        most = int(min(ceiling.params, ceiling.macs, math.prod(shape)) // shape[1])
        width = options.get("width") or most // multiple * multiple
        return [ChannelsSpec(width, multiple)] if 1 <= width <= most else []

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[ChannelsSpec]:
        """Return the smallest width on the greedy path whose error is within the tolerance."""
        found = self.curve(weight, metric, options, math.inf)
        good = [spec for spec, error in found if error <= tolerance]
        return good[:1] or [ChannelsSpec(weight.shape[0])]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[ChannelsSpec, float]]:
        """Return the error after every greedy step."""
        multiple = options.get("multiple", 1)
        if options.get("width") is not None:
            spec = ChannelsSpec(options["width"], multiple)
            return [(spec, self.errors(weight, metric, [spec])[0])]
        _, path = ordered(weight, metric, multiple)
        total = path[0][1] or 1.0
        return [
            (ChannelsSpec(width, multiple), max(left / total, 0.0) ** 0.5)
            for width, left in path[1:]
            if width % multiple == 0
        ]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[ChannelsSpec]) -> list[float]:
        """Return the relative error of each width: of a greedy step, or measured between steps.

        Errors that are small enough for rounding to matter are measured as well.
        """
        found: dict[ChannelsSpec, float] = {}
        for multiple in {spec.multiple for spec in specs}:
            widest = max(spec.width for spec in specs if spec.multiple == multiple)
            _, path = ordered(weight, metric, multiple, widest)
            total = path[0][1]
            found |= {
                ChannelsSpec(width, multiple): (left / total) ** 0.5
                for width, left in path
                if left > ACCURATE * total
            }
        between = [spec for spec in specs if spec not in found]
        measured = super().errors(weight, metric, between)
        found |= dict(zip(between, measured, strict=True))
        return [found[spec] for spec in specs]

    def reconstruct(self, shape: Shape, spec: ChannelsSpec, factors: Factors) -> Tensor:
        """Return the ``(hidden, out)`` matrix: the new rows, and zeros for dropped channels."""
        table = factors["rows"].new_zeros(shape)
        table[factors["kept"]] = factors["rows"]
        return table


def ordered(
    weight: Tensor, metric: Metric, multiple: int = 1, width: int | None = None
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Order the channels, best first, in batches of a multiple: all, or at least ``width``.

    The metric is that of the ``(hidden, out)`` matrix. Also return the number of channels taken and
    the squared error left after every step.
    """
    batch = -(-len(weight) // STEPS // multiple) * multiple
    most = len(weight) if width is None else width
    return greedy_order(moment_of(weight, metric), weighted(weight, metric), batch, most)


FORMAT = Channels()
