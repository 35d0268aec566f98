"""The result of a search over levels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tnlm.plans.plan import Plan


@dataclass(frozen=True)
class LevelSearchResult:
    """The result of a search over levels.

    Attributes:
        plan: the decision for every matrix.
        before: divergence of the loss-aware allocation, in nats per token.
        after: divergence of the plan, on the same tokens.
        generations: divergence of the parent after every generation.
        tokens: tokens that were run through compressed models in this call.
        scales: what the predicted losses of every unit were multiplied by, if asked for.
        scaled: divergence of the allocation on the scaled curves, on the same tokens.
        unchanged: whether that is the same allocation.
    """

    plan: Plan
    before: float
    after: float
    generations: tuple[float, ...]
    tokens: int
    scales: Mapping[str, float] = field(default_factory=dict)
    scaled: float | None = None
    unchanged: bool = False

    def __str__(self) -> str:
        divergence = f"divergence: {self.before:.6g} -> {self.after:.6g} nats per token"
        cost = f"{len(self.generations)} generations, {self.tokens:,} tokens"
        lines = [str(self.plan), f"{divergence}, {cost}"]
        if self.scaled is not None:
            used = "kept" if self.scaled < self.before else "not better: the unscaled one is kept"
            used = "the same allocation" if self.unchanged else used
            lines.append(f"allocation on scaled curves: {self.scaled:.6g} nats per token, {used}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self), indent=1)
