"""The start of a search over levels, and the generations that evolve from it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import trange

from tnlm.allocation.curves import Curve
from tnlm.allocation.loss import least_loss
from tnlm.studies.level_search.divergence import Divergence
from tnlm.studies.level_search.levels import State, mutated, step_of
from tnlm.studies.level_search.scaling import TRUST, scaled, scales_of
from tnlm.studies.level_search.selection import Selection
from tnlm.studies.level_search.trials import Trials

logger = logging.getLogger("tnlm")

Parent = tuple[State, float]
"""A state, with its divergence on the tokens of the last stage."""


@dataclass(frozen=True)
class Evolution:
    """Evolves the levels of all units within one budget.

    Attributes:
        trials: measures states.
        curves: the candidates of every unit.
        budget: the most that all units may cost.
        selection: how offspring are selected.
    """

    trials: Trials
    curves: Sequence[Curve]
    budget: float
    selection: Selection

    def start(self, curves: Sequence[Curve] | None = None) -> Parent:
        """Return the state of least predicted loss, on the given curves in place of its own."""
        used = self.curves if curves is None else curves
        chosen = least_loss(used, self.budget)
        state = tuple(curve.index(one) for curve, one in zip(used, chosen, strict=True))
        return state, self.trials.measure(state, self.selection.tokens[-1])

    def scales(self, start: State, apart: Divergence, tokens: int, progress: bool) -> list[float]:
        """Return the scale of every unit, see :func:`scales_of`.

        Args:
            start: the levels at which units are measured.
            apart: measures on windows of its own.
            tokens: how many of their tokens.
            progress: show a progress bar.
        """

        def measure(state: State) -> float:
            return self.trials.measure(state, tokens, apart)

        return scales_of(self.curves, start, self.trials.names, measure, progress=progress)

    def rescaled(self, parent: Parent, scales: Sequence[float]) -> tuple[Parent, Parent]:
        """Return the better of a parent and the start on scaled curves, and the latter."""
        other = self.start(scaled(self.curves, [scale**TRUST for scale in scales]))
        better = min(parent, other, key=lambda each: each[1])  # the parent, if they are equal
        if better[0] != other[0]:
            logger.warning(
                "the allocation on scaled curves diverges by %.6g nats per token, the unscaled one "
                "by %.6g, not better: the unscaled one is kept",
                other[1],
                parent[1],
            )
        self.trials.keep(better[0])
        return better, other

    def evolve(
        self, parent: Parent, generations: int, seed: int, progress: bool
    ) -> tuple[Parent, tuple[float, ...]]:
        """Return the last parent, and the divergence of the parent after every generation."""
        draws, path = random.Random(seed), []
        for _ in trange(generations, desc="searching", unit="generation", disable=not progress):
            parent = self.generation(parent, draws)
            path.append(parent[1])
        return parent, tuple(path)

    def generation(self, parent: Parent, draws: random.Random) -> Parent:
        """Return the best of a parent and its offspring."""
        step = step_of(self.curves)
        pool = [
            mutated(self.curves, parent[0], self.budget, step, draws)
            for _ in range(self.selection.offspring)
        ]
        pool = [state for state in dict.fromkeys(pool) if state != parent[0]]
        values: list[float] = []
        for count, tokens in zip(self.selection.survivors, self.selection.tokens, strict=True):
            values = [self.trials.measure(state, tokens) for state in pool]
            order = sorted(range(len(pool)), key=values.__getitem__)[:count]
            pool, values = [pool[index] for index in order], [values[index] for index in order]
        best = parent if not pool or values[0] >= parent[1] else (pool[0], values[0])
        self.trials.keep(best[0])
        return best
