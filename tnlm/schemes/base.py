"""The class of schemes: a scheme names one combination of choices, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads choices before it needs torch
    from tnlm.targets.base import Selector


def choice(default: Any, text: str, keyword: str = "", *, shell: bool = True) -> Any:
    """Return a dataclass field for a keyword of `tnlm.compress`.

    Args:
        default: its value if not given.
        text: its help text, one sentence.
        keyword: its name in the call; the field's name if empty.
        shell: whether the command line has an option for it.
    """
    return field(default=default, metadata={"text": text, "keyword": keyword, "shell": shell})


FITTED_TO_DATA = {"metric": "two-sided", "allocation": "loss"}
"""What structures published for the weights alone do if calibration data is given."""


@dataclass(frozen=True)
class Scheme:
    """One published method as a set of choices; a call can override any of them.

    Attributes:
        name: the name that users write.
        title: one line for tables.
        formats: the structures that may replace a matrix; the allocation chooses among several.
        source: the paper.
        metric: how errors are measured; a name in `tnlm.metrics.named`.
        allocation: how the budget is split across matrices; a name in `tnlm.allocation`.
        cascade: how fits account for earlier ones; see `tnlm.compression.cascade`.
        targets: the default choice of matrices.
        anchor: fraction of the anchoring in a cascade.
        damping: fraction of a second moment replaced by its mean diagonal; the metric's default
            if None.
        split: whether fused projections are several matrices, or one each.
        share: consecutive blocks whose matrices share their input factor.
        precision: in which weights are stored; the model's dtype if None, by the budget if "auto".
        group: columns that share a scale.
        symmetric: whether zero is the middle code.
        recover: how the whole model is trained after fitting; see `tnlm.recovery`.
        refine_passes: passes over the windows trained on, which tune each block after it is
            fitted, if the call gives neither ``refine`` nor ``refine_passes``.
        distillation: what ``recover="distill"`` compares; a preset of `tnlm.recovery.lessons`.
        keep_targets: fraction of the targets' parameters to keep if the call sets no size.
        unit: unit of the budget if the call names none.
        defaults: default values of the formats' options.
        with_data: the choices, by field, if calibration data is given and the call names no metric;
            empty for a scheme that ignores data by definition, and so refuses it.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    source: str
    metric: str = choice(
        "identity",
        "How errors are measured: {names}; movement and pruned train and prune a copy of the model "
        "first.",
    )
    allocation: str = choice("uniform", "How the budget is split: {names}.")
    cascade: str = choice(
        "none", "How fits account for earlier ones: none, sequential or anchored."
    )
    anchor: float = choice(
        1.0,
        "Fraction of the anchoring, with cascade anchored: 1 for all, 0 for none (sequential).",
    )
    damping: float | None = choice(None, "Fraction of a moment replaced by its mean diagonal.")
    targets: Selector = "all-linear"
    split: bool = choice(
        True, "Take fused projections as several matrices: q, k and v; gate and up."
    )
    share: int = choice(1, "Consecutive blocks that share an input factor (low rank only).")
    precision: str | None = choice(
        None, "Bits of the codes in which weights are stored: int2 to int8, or auto for the budget."
    )
    group: int | None = choice(
        None, "Columns that share a scale; 64 by default, and a whole row for int8."
    )
    symmetric: bool = choice(
        True, "Put zero in the middle of the codes; otherwise each group has its own zero."
    )
    recover: str = "none"
    refine_passes: int = 0
    distillation: str = "logits"
    keep_targets: float = 0.8
    unit: str = "params"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    with_data: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """What the scheme needs besides the weights: nothing, data, or data and gradients."""
        from tnlm.allocation import get_allocation
        from tnlm.metrics.measure import FISHER, GRADIENTS, LORA, MOVEMENT, SLOPES
        from tnlm.metrics.named import get_measure

        needed = get_measure(self.metric).needs
        weighs_loss = get_allocation(self.allocation).weighs_loss
        if needed & {GRADIENTS, FISHER, LORA, MOVEMENT, SLOPES} or weighs_loss:
            return "data and gradients"
        tunes = self.cascade != "none" or self.recover != "none" or self.refine_passes > 0
        return "data" if needed or tunes else "nothing"

    @property
    def needs_calibration(self) -> bool:
        """Whether the scheme needs data."""
        return self.needs != "nothing"
