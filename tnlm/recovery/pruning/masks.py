"""Masks of the groups that remain while a model is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.recovery.pruning.groups import Groups


class Masks:
    """The remaining groups, and the moving averages of their importance.

    A masked group stays masked: nothing depends on it any more, so its gradients do not show its
    importance.

    Example:
        >>> from tnlm.recovery.pruning.groups import Cut
        >>> from tnlm.targets.trial import Slabs
        >>> block = Groups("channels", "mlp", 3, (), Cut("mlp.down_proj", 1, Slabs()))
        >>> masks = Masks([block], decay=0.9)
        >>> masks.see(lambda _: torch.tensor([2.0, 1.0, 3.0]))
        >>> masks.shrink({"channels": 2.0})
        >>> masks.kept()[block]
        tensor([0, 2])
    """

    def __init__(self, groups: Sequence[Groups], decay: float) -> None:
        """Start with all groups, with importance 0."""
        self._decay = decay
        self._scores = {g: torch.zeros(g.count, dtype=torch.float64) for g in groups}
        self._left = {g: torch.ones(g.count, dtype=torch.bool) for g in groups}

    def see(self, importance: Callable[[Groups], Tensor]) -> None:
        """Update the averages with a step: λ times the old plus 1 − λ times the new importance."""
        for groups, score in self._scores.items():
            score.lerp_(importance(groups).to(score), 1.0 - self._decay)

    def shrink(self, counts: Mapping[str, float]) -> None:
        """Mask the least important groups of every block, down to the given counts by kind."""
        for groups, left in self._left.items():
            score = self._scores[groups].masked_fill(~left, -torch.inf)
            best = score.topk(min(round(counts[groups.kind]), int(left.sum()))).indices
            self._left[groups] = torch.zeros_like(left).index_fill_(0, best, True)

    def kept(self) -> dict[Groups, Tensor]:
        """Return the indices of the remaining groups, in order."""
        return {groups: left.nonzero().flatten() for groups, left in self._left.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Zero the outputs of masked groups while a block of code runs."""

        def hook(groups: Groups) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                mask = self._left[groups].repeat_interleave(groups.consumer.slabs.size)
                return (args[0] * mask.to(args[0]), *args[1:])

            return before

        handles = [
            model.get_submodule(groups.consumer.module).register_forward_pre_hook(hook(groups))
            for groups in self._left
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
