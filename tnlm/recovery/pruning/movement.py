"""First-order (movement) pruning: entries that training moves towards zero go, while it trains.

Source: LPAF, Ren and Zhu 2023 (arXiv 2306.14152), after movement pruning, Sanh et al. 2020 (arXiv
2005.07683). LPAF's settings are not published: the defaults here are tnlm's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import PreTrainedModel

from tnlm.errors import BudgetError, OptionError, TargetError, TrainingError
from tnlm.recovery.guard import GuardedTrainer
from tnlm.recovery.pruning.schedule import cubic
from tnlm.recovery.training import finetune
from tnlm.targets.base import Member


@dataclass(frozen=True)
class Pruned:
    """A model after movement pruning, and what decided it.

    Attributes:
        model: the pruned copy.
        scores: ``(out, in)`` by the target's name: what is larger stays.
        masks: ``(out, in)`` by the target's name, True where an entry stays.
    """

    model: PreTrainedModel
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]


def movement_prune(
    model: PreTrainedModel,
    data: Any,
    targets: Sequence[Member],
    *,
    keep: float = 0.5,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    **options: Any,
) -> Pruned:
    """Fine-tune a copy of a model, and prune the entries whose weights training moves to zero.

    Over the steps each entry gathers a score, S = −Σ (∂L/∂W) W with the gradient of that step. The
    model is run on W·M, where the mask M keeps the highest scores of every matrix, fewer and fewer
    of them along a cubic. The gradient at W·M is taken for that of W (straight through), so that
    what is masked still learns, and may come back. A matrix without gradients stays whole.

    The weights of the targets alone are trained; LPAF trains all others with them.

    Args:
        model: left as it is; most often fine-tuned on the task already.
        data: see :func:`tnlm.recovery.training.finetune`.
        targets: linear matrices, as :func:`tnlm.targets.selection.select` finds them.
        keep: share of a matrix's entries that stays.
        warmup: share of the steps before the first entries go.
        cooldown: share of the steps after the last went.
        **options: as ``finetune`` takes them, but for ``output_dir``: a checkpoint has no scores.

    Returns:
        The pruned copy, whose masked weights are zero, with the scores and the masks.

    Raises:
        BudgetError: for ``keep`` out of range.
        OptionError: for another option out of range.
        TargetError: if a target is not linear.
        TrainingError: as ``finetune`` raises it, or if a score is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tnlm.targets.selection import select
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> targets = select(model, ["c_fc"]).targets
        >>> found = movement_prune(model, torch.arange(64) % 16, targets, keep=0.25,
        ...                        max_length=8, batch_size=2, progress=False)
        >>> int(found.masks["transformer.h.0.mlp.c_fc"].sum())  # of 32 x 8
        64
    """
    if not 0 < keep <= 1:
        raise BudgetError(f"keep={keep!r}; allowed: a share above 0, at most 1")
    if not (warmup >= 0 <= cooldown and warmup + cooldown <= 1):
        raise OptionError(f"warmup={warmup!r}, cooldown={cooldown!r}; allowed: shares of the steps")
    if "output_dir" in options:
        raise OptionError("output_dir= has no effect: pruning cannot be resumed; leave it out")
    for target in targets:
        if target.unmeasured:
            raise TargetError(f"{target.name} is an {target.kind}; name linear matrices alone")
    pruned = copy.deepcopy(model)
    entries = Entries(pruned, targets)
    make = partial(MovementTrainer, entries=entries, keep=keep, warmup=warmup, cooldown=cooldown)
    finetune(pruned, data, trainer=make, **options)
    entries.keep(keep)
    entries.write(model)
    return Pruned(pruned, entries.scores, entries.masks)


class Masked(nn.Module):
    """A weight of which entries are masked; its gradient is that of the whole (straight through).

    Example:
        >>> masked, weight = Masked(torch.ones(2)), torch.tensor([3.0, 5.0], requires_grad=True)
        >>> masked.mask[0] = False
        >>> masked(weight).sum().backward()
        >>> masked(weight).tolist(), weight.grad.tolist()
        ([0.0, 5.0], [1.0, 1.0])
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Mask nothing yet."""
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight - (weight * ~self.mask).detach()


class Entries:
    """The entries of matrices, with their scores, and masks that the model runs under.

    Args:
        model: changed in place: the weights of the targets alone require gradients.
        targets: linear matrices.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[Member]) -> None:
        """Start with no scores, and nothing masked."""
        self._model, self._targets = model, targets
        self._masked: dict[str, Masked] = {}
        self._weights: dict[str, nn.Parameter] = {}
        model.requires_grad_(False)
        for name in dict.fromkeys(target.module for target in targets):
            module: Any = model.get_submodule(name)
            self._weights[name] = module.weight.requires_grad_(True)
            self._masked[name] = Masked(module.weight)
            register_parametrization(module, "weight", self._masked[name])
        self.scores = {
            target.name: torch.zeros(target.shape, device=self._weights[target.module].device)
            for target in targets
        }
        self.masks = {name: torch.ones_like(s, dtype=torch.bool) for name, s in self.scores.items()}

    @torch.no_grad()
    def see(self) -> None:
        """Take in the gradients of a whole step, −(∂L/∂W) W."""
        for target in self._targets:
            weight = self._weights[target.module]
            if weight.grad is not None:
                gradient = self._part(target, weight.grad).float()
                self.scores[target.name] -= gradient * self._part(target, weight).float()

    def keep(self, share: float) -> None:
        """Mask all but a share of every matrix, those with the highest scores.

        Raises:
            TrainingError: if a score is not finite.
        """
        for target in self._targets:
            scores = self.scores[target.name]
            if not bool(scores.isfinite().all()):
                raise TrainingError(
                    f"a score of {target.name} is not finite; try a lower learning_rate"
                )
            self.masks[target.name] = highest(scores, share)
            module = self._model.get_submodule(target.module)
            target.write(module, self._masked[target.module].mask, self.masks[target.name])

    def write(self, like: PreTrainedModel) -> None:
        """Set masked weights to zero, and require the gradients that another model does."""
        for name in self._masked:
            remove_parametrizations(self._model.get_submodule(name), "weight")
        for own, other in zip(self._model.parameters(), like.parameters(), strict=True):
            own.requires_grad_(other.requires_grad)

    def _part(self, target: Member, stored: Tensor) -> Tensor:
        return target.part_of(self._model.get_submodule(target.module), stored)


class MovementTrainer(GuardedTrainer):
    """Trains a model while its entries gather scores, and fewer and fewer of them are left.

    Args:
        entries: of the model.
        keep: share of them that stays in the end.
        warmup: share of the steps before the first go.
        cooldown: share of the steps after the last went.
        **arguments: to ``transformers.Trainer``.
    """

    def __init__(
        self, *, entries: Entries, keep: float, warmup: float, cooldown: float, **arguments: Any
    ) -> None:
        """Hold the course; see the class for the arguments."""
        super().__init__(**arguments)
        self._entries, self._keep = entries, keep
        self._warmup, self._cooldown = warmup, cooldown

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mask what has the lowest scores so far, and take the gradients of a batch.

        Where gradients of several batches are accumulated, those of the whole step count once.
        """
        step = self.state.global_step
        if step:  # before the first nothing is known of any entry
            self._entries.keep(self._share(step))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last batch of the step
            self._entries.see()
        return loss

    def _share(self, step: int) -> float:
        steps = self.state.max_steps
        warmup = round(self._warmup * steps)
        cooldown = min(round(self._cooldown * steps), steps - warmup)
        return cubic(step, steps, end=self._keep, warmup=warmup, cooldown=cooldown)


def highest(scores: Tensor, share: float) -> Tensor:
    """Return a mask of a share of the entries, at least one, with the highest scores.

    Where all scores are the same, as without any gradient, it is of all entries.

    Example:
        >>> highest(torch.tensor([[3.0, -1.0], [2.0, 0.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    flat = scores.flatten()
    if bool((flat == flat[0]).all()):
        return torch.ones_like(scores, dtype=torch.bool)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(share * len(flat))), sorted=False).indices] = True
    return mask.view_as(scores)
