"""Checks a plan before anything is fitted: whether it does what was asked."""

from __future__ import annotations

import logging

from tnlm.allocation.base import Limits
from tnlm.errors import BudgetError, OptionError
from tnlm.plans.plan import Plan
from tnlm.precision.grid import Precision

logger = logging.getLogger("tnlm")


def check_packed(decided: Plan, grid: Precision | None) -> None:
    """Raise if a precision was given and nothing can be packed; warn of what cannot."""
    left = [layer for layer in decided.layers if layer.precision is None]
    if grid is None or not left:
        return
    why = "the factors of embeddings and of stacked experts keep the model's dtype"
    if len(left) == len(decided.layers):
        raise OptionError(
            f"precision={grid.name!r} has no effect on {left[0].name}, nor on any other: {why}",
            argument="precision",
        )
    logger.warning(
        "%d of %d targets are not stored as %s, %s first: %s",
        len(left),
        len(decided.layers),
        grid.name,
        left[0].name,
        why,
    )


def check_worth(decided: Plan, limits: Limits) -> None:
    """Raise `BudgetError` if nothing would shrink; warn if the budget is missed or not used."""
    if not decided.layers:
        name, reason = next(iter(decided.skipped.items()), ("none", "no target was chosen"))
        raise BudgetError(f"no matrix would shrink; every target is left alone: {name}: {reason}")
    dense = [layer for layer in decided.layers if not layer.replaced]
    if len(dense) == len(decided.layers):
        raise BudgetError(f"no matrix would shrink; {dense[0].name}: {dense[0].note}")
    achieved = limits.price(decided.targets_after) / limits.price(decided.targets_before)
    if dense and achieved > limits.keep * (1 + 1e-9):
        logger.warning(
            "asked to keep %.3f of the targets' %s, achieved %.3f: "
            "%d of %d matrices stay dense (%s: %s)",
            limits.keep,
            limits.unit,
            achieved,
            len(dense),
            len(decided.layers),
            dense[0].name,
            dense[0].note,
        )
    sized = set(decided.request) & {"terms", "rank", "ranks", "tolerance"}
    if achieved < limits.keep / 2 and not sized:
        logger.warning(
            "asked to keep %.3f of the targets' %s, achieved %.3f: larger factors would need more "
            "than max_macs=%s times the dense multiply-adds; raise max_macs= to allow them",
            limits.keep,
            limits.unit,
            achieved,
            decided.request.get("max_macs", "inf"),
        )
