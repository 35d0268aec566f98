"""Last-blocks allocation (LLM-ROM): the first blocks stay dense, the last share the cut."""

from __future__ import annotations

import re
from dataclasses import replace

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import Uniform, stay_dense
from tnlm.errors import BudgetError
from tnlm.planning import LayerPlan


def schedule(keep: float, blocks: int, last: int | None = None) -> tuple[int, float]:
    """Return how many of the last blocks are cut, and the fraction that each of them keeps.

    The paper cuts the last 8, 12 and 24 of 32 blocks to keep 0.9, 0.8 and 0.5 overall; the line
    through these three is used for any budget.

    Raises:
        BudgetError: if the blocks cannot lose so much.

    Source: LLM-ROM, Chavan et al. 2023, arXiv 2312.07046, section 3.

    Example:
        >>> [schedule(keep, 32) for keep in (0.9, 0.8, 0.5)]
        [(8, 0.6), (12, 0.46666666666666673), (24, 0.33333333333333337)]
    """
    if last is None:
        last = min(blocks, max(1, round(blocks * (1.375 - 1.25 * keep))))
    share = 1.0 - (1.0 - keep) * blocks / last
    if share <= 0:
        raise BudgetError(
            f"keep of {keep:.4g} with the last {last} of {blocks} blocks; each would keep nothing. "
            f"The smallest possible is {1.0 - last / blocks:.4g}, or cut more blocks"
        )
    return last, share


def block_of(name: str) -> int | None:
    """Return the number of the block that a module stands in, if it stands in one.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj"), block_of("lm_head")
        (12, None)
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


class LastBlocks(Allocation):
    """Leave the first blocks dense and cut the last ones evenly."""

    name = "last"
    title = "the last blocks share the cut evenly (LLM-ROM)"
    units = ("params", "macs")
    counts_blocks = True

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Cut the targets of the last blocks uniformly."""
        numbers = {block_of(target.module) for target in problem.targets} - {None}
        blocks = sorted(number for number in numbers if number is not None)
        if not blocks:
            raise BudgetError("allocation='last' needs targets in numbered blocks; use 'uniform'")
        count, share = schedule(problem.limits.keep, len(blocks), problem.limits.blocks)
        cut = set(blocks[-count:])
        chosen = [t for t in problem.targets if block_of(t.module) in cut]
        joint = [t for t in problem.joint if block_of(t.module) in cut]
        inner = replace(
            problem, targets=chosen, joint=joint, limits=replace(problem.limits, keep=share)
        )
        kept = [t for t in problem.targets if block_of(t.module) not in cut]
        note = "before the last blocks that are cut"
        dense = [stay_dense(target, target.weight(problem.model), note) for target in kept]
        return [*dense, *Uniform().allocate(inner)]


ALLOCATION = LastBlocks()
