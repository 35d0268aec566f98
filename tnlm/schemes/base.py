"""What a scheme is: a name for one combination of choices, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tnlm.targets import ALL_LINEAR


@dataclass(frozen=True)
class Scheme:
    """One published system as its choices; any of them can be overridden in the call.

    Attributes:
        name: what users write.
        title: one line for tables.
        format: the structure that replaces each matrix.
        source: the paper.
        metric: how the error is measured: ``"identity"``, or ``"input"``, which needs calibration.
        targets: the matrices chosen when the user names none.
        defaults: values of the format's options.
    """

    name: str
    title: str
    format: str
    source: str
    metric: str = "identity"
    targets: str = ALL_LINEAR
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_calibration(self) -> bool:
        """Whether the scheme looks at data."""
        return self.metric != "identity"
