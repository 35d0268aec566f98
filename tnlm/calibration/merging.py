"""Adds up what processes have summed over their shares of the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from tnlm.parallel.workers import Workers


def merge(sums: dict[str, dict[str, Tensor]], workers: Workers) -> None:
    """Replace the sums of modules by those of all processes together, in place.

    A process may lack modules that its batches do not reach, such as experts.

    Example:
        >>> sums = {"up": {"mean": torch.ones(2)}}
        >>> merge(sums, Workers())
        >>> sums
        {'up': {'mean': tensor([1., 1.])}}
    """
    own = {name: {k: (t.shape, t.dtype) for k, t in of.items()} for name, of in sums.items()}
    shapes: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for found in workers.gather(own):
        shapes |= {name: about for name, about in found.items() if name not in shapes}
    for name, about in shapes.items():
        if name not in sums:
            sums[name] = {k: torch.zeros(shape, dtype=dtype) for k, (shape, dtype) in about.items()}
        for key in about:
            workers.add_up(sums[name][key])


def merged_counts(counts: Mapping[str, int], workers: Workers) -> dict[str, int]:
    """Return the counts of modules of all processes together.

    Example:
        >>> merged_counts({"up": 3}, Workers())
        {'up': 3}
    """
    total: Counter[str] = Counter()
    for found in workers.gather(dict(counts)):
        total.update(found)
    return dict(total)
