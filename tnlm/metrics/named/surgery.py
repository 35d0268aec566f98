"""The two-sided metric, with the rows and columns that LLM Surgeon leaves of a matrix."""

from __future__ import annotations

from torch import Tensor

from tnlm.metrics.measure import GRADIENTS, INPUTS, SURGERY, Gathered, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.named.two_sided import effect_of_both
from tnlm.metrics.sides import Side


class Operated(Metric):
    """The error of the output weighted by its effect on the loss, of an operated matrix.

    Args:
        outputs: G, the weighting of the rows.
        inputs: C, the weighting of the columns.
        rows: indices of the kept rows.
        columns: indices of the kept columns.
        core: the kept values, ``(len(rows), len(columns))``.

    Source: LLM Surgeon, van der Ouderaa et al. 2024, arXiv 2312.17244.
    """

    def __init__(
        self, outputs: Side, inputs: Side, rows: Tensor, columns: Tensor, core: Tensor
    ) -> None:
        """Store the sides and what is kept; see the class for the arguments."""
        super().__init__(outputs, inputs)
        self.rows, self.columns, self.core = rows, columns, core


def _build(of: Gathered, damping: float) -> Operated:
    sides = Side(of("gradient"), damping), Side(of("moment"), damping)
    return Operated(*sides, of("kept_rows"), of("kept_columns"), of("core"))


MEASURES = (
    Measure(
        "surgery",
        "K-FAC error of matrices whose rows and columns are removed in several shots (LLM Surgeon)",
        build=_build,
        importance=effect_of_both,
        needs=frozenset({INPUTS, GRADIENTS, SURGERY}),
        gathering={GRADIENTS: {"moment": "full"}},
        damping=1e-2,
        operates=True,
    ),
)
