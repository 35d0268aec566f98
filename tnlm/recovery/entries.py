"""The entries of matrices that are pruned one by one: their scores, and which are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnlm.recovery.groups import matrix
from tnlm.targets import Target


class Entries:
    """The matrices that are pruned, with scores and masks for their entries.

    Args:
        model: holds them.
        targets: linear matrices.
        moving: scores gather what moves; otherwise they are magnitudes.
        scope: ``"matrix"``, the same share of every matrix stays, or ``"global"``, of all together.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], moving: bool, scope: str
    ) -> None:
        """Start with no scores; see the class for the arguments."""
        self.parts = {target.module: len(target.parts) or 1 for target in targets}
        self.modules = {name: model.get_submodule(name) for name in self.parts}
        self.weights = [module.get_parameter("weight") for module in self.modules.values()]
        self._moving, self._scope = moving, scope
        like = {name: matrix(module) for name, module in self.modules.items()}
        self.scores = {
            name: torch.zeros(weight.shape, device=weight.device) for name, weight in like.items()
        }
        self.masks = {name: torch.ones_like(s, dtype=torch.bool) for name, s in self.scores.items()}

    @torch.no_grad()
    def see(self) -> None:
        """Take in the gradients of a step."""
        for name, module in self.modules.items():
            weight = matrix(module).float()
            if not self._moving:
                self.scores[name].copy_(weight.abs())
                continue
            gradient = module.get_parameter("weight").grad
            if gradient is not None:
                turned = gradient.T if isinstance(module, Conv1D) else gradient
                self.scores[name].sub_(turned.float() * weight)

    def keep(self, share: float) -> None:
        """Mask all but the highest scores."""
        if self._scope == "global":
            chosen = highest(torch.cat([s.flatten() for s in self.scores.values()]), share)
            pieces = chosen.split([s.numel() for s in self.scores.values()])
            for mask, piece in zip(self.masks.values(), pieces, strict=True):
                mask.copy_(piece.view_as(mask))
            return
        for name, scores in self.scores.items():
            parts = scores.chunk(self.parts[name])
            self.masks[name].copy_(torch.cat([highest(part, share) for part in parts]))

    @torch.no_grad()
    def write(self) -> None:
        """Set masked weights to zero."""
        for name, module in self.modules.items():
            matrix(module).mul_(self.masks[name])

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Run a block of code on the masked weights; the gradients that it takes stay."""
        held = [weight.detach().clone() for weight in self.weights]
        try:
            self.write()
            yield
        finally:
            with torch.no_grad():
                for weight, values in zip(self.weights, held, strict=True):
                    weight.copy_(values)


def highest(scores: Tensor, share: float) -> Tensor:
    """Return a mask of a share of the entries, at least one, with the highest scores.

    Example:
        >>> highest(torch.tensor([[3.0, -1.0], [2.0, 0.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    flat = scores.flatten()
    count = max(1, round(share * len(flat)))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count, sorted=False).indices] = True
    return mask.view_as(scores)
