"""What a scheme is: a name for one combination of choices, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tnlm.allocation import get_allocation
from tnlm.metrics.named import FISHER, GRADIENTS, LORA, MOVEMENT, get_measure
from tnlm.targets.base import Selector
from tnlm.targets.selection import ALL_LINEAR


@dataclass(frozen=True)
class Scheme:
    """One published system as its choices; any of them can be overridden in the call.

    Attributes:
        name: what users write.
        title: one line for tables.
        formats: the structures that may replace a matrix; the allocation chooses among several.
        source: the paper.
        metric: how the error is measured; a name in `tnlm.metrics.named`.
        allocation: how the budget is shared out; a name in `tnlm.allocation`.
        cascade: how far a fit knows what was fitted before it; see `tnlm.compression.cascade`.
        targets: the matrices chosen when the user names none.
        share: consecutive blocks whose matrices share their input factor.
        recover: how the whole model is trained afterwards; see `tnlm.recovery`.
        distillation: what ``recover="distill"`` compares; a preset of `tnlm.recovery.lessons`.
        keep_targets: fraction of the targets kept when nothing says how large the result may be.
        defaults: values of the formats' options.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    source: str
    metric: str = "identity"
    allocation: str = "uniform"
    cascade: str = "none"
    targets: Selector = ALL_LINEAR
    share: int = 1
    recover: str = "none"
    distillation: str = "logits"
    keep_targets: float = 0.8
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """What the scheme looks at besides the weights: nothing, data, or data and gradients."""
        needed = get_measure(self.metric).needs
        weighs_loss = get_allocation(self.allocation).weighs_loss
        if needed & {GRADIENTS, FISHER, LORA, MOVEMENT} or weighs_loss:
            return "data and gradients"
        tunes = self.cascade != "none" or self.recover != "none"
        return "data" if needed or tunes else "nothing"

    @property
    def needs_calibration(self) -> bool:
        """Whether the scheme looks at data."""
        return self.needs != "nothing"
