"""A possible decision, with its price and its predicted loss."""

from __future__ import annotations

from dataclasses import dataclass

from tnlm.plans.plan import LayerPlan


@dataclass(frozen=True)
class Candidate:
    """A possible decision for a matrix, or for several together.

    Attributes:
        layers: the decisions.
        price: their cost, in the unit of the budget.
        loss: the predicted loss: squared errors times their effect on the loss.
    """

    layers: tuple[LayerPlan, ...]
    price: float
    loss: float

    @property
    def error(self) -> float:
        """The largest relative error."""
        return max(layer.error or 0.0 for layer in self.layers)
