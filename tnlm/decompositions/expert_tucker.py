"""Expert Tucker: one matrix of all experts of a mixture as the slices of a third-order tensor."""

from __future__ import annotations

from tnlm.decompositions.stack_tucker import StackTucker


class ExpertTucker(StackTucker):
    """Stack Tucker of the same matrix of every expert of a module.

    What numbers no expert, the bases and the cores, is stored once for all of them.

    Source: Tucker 1966; multilinear whitening of stacked experts as in TD-MoE.

    Example:
        >>> from tnlm.decompositions.stack_tucker import StackTuckerSpec
        >>> spec = StackTuckerSpec((3, 2, 4), slices=3, stack=3, gauge=False)
        >>> FORMAT.network((12, 5), spec).factors
        {'core': 'aqr', 'mode1': 'bq', 'mode2': 'cr'}
    """

    name = "expert-tucker"
    title = "Tucker across the experts of a mixture, with shared bases and cores"
    kinds = frozenset({"expert-stack"})


FORMAT = ExpertTucker()
