"""How long work on a target takes, compared to others."""

from __future__ import annotations

from tnlm.parallel.workers import Size
from tnlm.targets.base import Target


def size_of(target: Target) -> Size:
    """Return the size of a decomposition of a target's matrix.

    Its time grows with the number of parameters times the longer side. Targets of one parent
    module form a group, since many of them have the same input, whose metric is computed once.

    Example:
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> size_of(MatrixTarget("h.0.attn.q", "h.0.attn.q", (4, 2)))
        Size(cost=32, group='h.0.attn')
    """
    return Size(target.params * max(target.shape), target.module.rpartition(".")[0])
