"""First-order (movement) pruning: removes entries that training moves towards zero.

Source: LPAF, Ren and Zhu 2023 (arXiv 2306.14152), after movement pruning, Sanh et al. 2020 (arXiv
2005.07683). LPAF's settings are not published; the defaults here are tnlm's own.
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
    """A model after movement pruning, with scores and masks.

    Attributes:
        model: the pruned copy.
        scores: ``(out, in)`` by target name; entries with larger scores are kept.
        masks: ``(out, in)`` by target name, True for kept entries.
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
    """Fine-tune a copy of a model, and prune the entries that training moves to zero.

    Each entry accumulates a score over the steps, S = −Σ (∂L/∂W) W. The model runs with W·M, where
    the mask M keeps the highest scores of every matrix; their number falls along a cubic schedule.
    The gradient at W·M is used for W (straight-through), so that masked entries still learn and may
    return. A matrix without gradients is not pruned.

    Only the weights of the targets are trained; LPAF also trains all others.

    Args:
        model: left unchanged; usually already fine-tuned on the task.
        data: see :func:`tnlm.recovery.training.finetune`.
        targets: linear matrices from :func:`tnlm.targets.selection.select`.
        keep: fraction of a matrix's entries to keep.
        warmup: fraction of the steps before pruning starts.
        cooldown: fraction of the steps after pruning ends.
        **options: arguments of ``finetune``, except ``output_dir``: a checkpoint has no scores.

    Returns:
        The pruned copy, whose masked weights are zero, with the scores and the masks.

    Raises:
        BudgetError: if ``keep`` is out of range.
        OptionError: if another option is out of range.
        TargetError: if a target is not linear.
        TrainingError: as in ``finetune``, or if a score is not finite.

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
        raise BudgetError(f"keep={keep!r}; allowed: a fraction in (0, 1]")
    if not (warmup >= 0 <= cooldown and warmup + cooldown <= 1):
        raise OptionError(
            f"warmup={warmup!r}, cooldown={cooldown!r}; allowed: fractions of the steps"
        )
    if "output_dir" in options:
        raise OptionError("output_dir= has no effect: pruning cannot be resumed; leave it out")
    for target in targets:
        if target.unmeasured:
            raise TargetError(f"{target.name} is an {target.kind}; name only linear matrices")
    pruned = copy.deepcopy(model)
    entries = Entries(pruned, targets)
    make = partial(MovementTrainer, entries=entries, keep=keep, warmup=warmup, cooldown=cooldown)
    finetune(pruned, data, trainer=make, **options)
    entries.keep(keep)
    entries.write(model)
    return Pruned(pruned, entries.scores, entries.masks)


class Masked(nn.Module):
    """A weight with masked entries; its gradient ignores the mask (straight-through).

    Example:
        >>> masked, weight = Masked(torch.ones(2)), torch.tensor([3.0, 5.0], requires_grad=True)
        >>> masked.mask[0] = False
        >>> masked(weight).sum().backward()
        >>> masked(weight).tolist(), weight.grad.tolist()
        ([0.0, 5.0], [1.0, 1.0])
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Start with nothing masked."""
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight - (weight * ~self.mask).detach()


class Entries:
    """The entries of matrices, with their scores and the masks applied in the model.

    Args:
        model: changed in place: only the weights of the targets require gradients.
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
        """Add a step's −(∂L/∂W) W to the scores."""
        for target in self._targets:
            weight = self._weights[target.module]
            if weight.grad is not None:
                gradient = self._part(target, weight.grad).float()
                self.scores[target.name] -= gradient * self._part(target, weight).float()

    def keep(self, share: float) -> None:
        """Mask all entries of every matrix but the fraction with the highest scores.

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
        """Set masked weights to zero, and copy ``requires_grad`` from another model."""
        for name in self._masked:
            remove_parametrizations(self._model.get_submodule(name), "weight")
        for own, other in zip(self._model.parameters(), like.parameters(), strict=True):
            own.requires_grad_(other.requires_grad)

    def _part(self, target: Member, stored: Tensor) -> Tensor:
        return target.part_of(self._model.get_submodule(target.module), stored)


class MovementTrainer(GuardedTrainer):
    """Trains a model while entries accumulate scores and are pruned.

    Args:
        entries: the model's entries.
        keep: fraction of them to keep in the end.
        warmup: fraction of the steps before pruning starts.
        cooldown: fraction of the steps after pruning ends.
        **arguments: passed to ``transformers.Trainer``.
    """

    def __init__(
        self, *, entries: Entries, keep: float, warmup: float, cooldown: float, **arguments: Any
    ) -> None:
        """Store the settings; see the class for the arguments."""
        super().__init__(**arguments)
        self._entries, self._keep = entries, keep
        self._warmup, self._cooldown = warmup, cooldown

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mask the entries with the lowest scores so far, and compute the gradients of a batch.

        If gradients of several batches are accumulated, scores are updated once per step.
        """
        step = self.state.global_step
        if step:  # there are no scores before the first step
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
    """Return a mask of the fraction of entries, at least one, with the highest scores.

    If all scores are the same, as without gradients, it keeps all entries.

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
