"""Last-blocks allocation (LLM-ROM): the first blocks stay dense, the last are cut evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import Uniform, stay_dense
from tnlm.errors import BudgetError
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target
from tnlm.utils.names import block_of


def schedule(keep: float, blocks: int, last: int | None = None) -> tuple[int, float]:
    """Return how many of the last blocks to cut, and the fraction that each of them keeps.

    The paper cuts the last 8, 12 and 24 of 32 blocks to keep 0.9, 0.8 and 0.5 overall; this uses
    the line through these points for any budget.

    Raises:
        BudgetError: if the blocks cannot be cut that much.

    Source: LLM-ROM, Chavan et al. 2023, arXiv 2312.07046.

    Example:
        >>> for keep in (0.9, 0.8, 0.5):
        ...     last, share = schedule(keep, 32)
        ...     print(last, round(share, 3))
        8 0.6
        12 0.467
        24 0.333
    """
    if last is not None and last > blocks:
        raise BudgetError(
            f"blocks={last}; the targets are in {blocks} blocks; allowed: 1 to {blocks}",
            argument="blocks",
        )
    if last is None:
        last = min(blocks, max(1, round(blocks * (1.375 - 1.25 * keep))))
    share = 1.0 - (1.0 - keep) * blocks / last
    if share <= 0:
        raise BudgetError(
            f"keep of {keep:.4g} with the last {last} of {blocks} blocks; they would keep nothing. "
            f"Keep more than {1.0 - last / blocks:.4g}, or cut more blocks"
        )
    return last, share


class LastBlocks(Allocation):
    """Leave the first blocks dense and cut the last ones evenly."""

    name = "last"
    title = "the last blocks share the cut evenly (LLM-ROM)"
    units = ("params", "macs")
    counts_blocks = True

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Cut the targets of the last blocks uniformly."""
        numbered = [t for t in problem.targets if block_of(t.module) is not None]
        blocks = sorted({block_of(t.module) or 0 for t in numbered})
        if not blocks:
            raise BudgetError(
                "allocation='last' needs targets in numbered blocks; use 'uniform'",
                argument="allocation",
            )
        count, share = schedule(_keep(problem, numbered), len(blocks), problem.limits.blocks)
        cut = set(blocks[-count:])
        chosen = [t for t in numbered if block_of(t.module) in cut]
        joint = [t for t in problem.joint if block_of(t.module) in cut]
        inner = replace(
            problem, targets=chosen, joint=joint, limits=replace(problem.limits, keep=share)
        )
        note = "not in the last blocks, which are cut"
        kept = [t for t in problem.targets if t not in chosen]
        dense = [stay_dense(target, target.weight(problem.model), note) for target in kept]
        decided = {layer.name: layer for layer in (*dense, *Uniform().allocate(inner))}
        order = [inner.replaced.get(target.name, target).name for target in problem.targets]
        return [decided[name] for name in dict.fromkeys(order)]


def _keep(problem: Problem, numbered: Sequence[Target]) -> float:
    """Return the fraction that targets in blocks keep, given that all others stay dense."""
    limits, inside = problem.limits, {target.name for target in numbered}
    prices = {target.name: limits.price(target.dense_cost(1)) for target in problem.targets}
    whole, part = sum(prices.values()), sum(prices[name] for name in inside)
    if whole == part:
        return limits.keep
    keep = 1.0 - (1.0 - limits.keep) * whole / part
    if keep <= 0:
        raise BudgetError(
            f"{limits.keep:.4g} of the targets' {limits.unit} cannot be met: targets outside of "
            f"blocks stay dense, and have {1.0 - part / whole:.4g} of them; leave them out of "
            "targets=",
            argument="targets",
        )
    return keep


ALLOCATION = LastBlocks()
