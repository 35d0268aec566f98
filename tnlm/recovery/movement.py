"""First-order (movement) pruning: entries that training moves towards zero go, while it trains.

Source: LPAF, Ren and Zhu 2023 (arXiv 2306.14152), after movement pruning, Sanh et al. 2020 (arXiv
2005.07683). LPAF's settings are not published: the defaults here are tnlm's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import count_tokens
from tnlm.calibration.store import Statistics
from tnlm.errors import BudgetError, OptionError, TargetError, did_you_mean
from tnlm.recovery.entries import Entries
from tnlm.recovery.loop import Batches, backward, check_course, clip, guarded, in_turn, usable
from tnlm.recovery.schedule import cubic
from tnlm.targets import Selector, Target, check_model, check_weights, select

logger = logging.getLogger("tnlm")

SCOPES = ("matrix", "global")
FLOOR = 1e-6
"""Smallest weight of a column, relative to the mean."""


@dataclass(frozen=True)
class Pruned:
    """What pruning decided, by module name; a fused module's matrices lie one below the other.

    Attributes:
        scores: ``(out, in)``, float32: what is larger stays.
        masks: ``(out, in)``, True where an entry stays.
    """

    scores: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    @property
    def kept(self) -> float:
        """The share of all entries that stays."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total


def movement_prune(
    model: PreTrainedModel,
    modules: Selector,
    batches: Batches,
    *,
    steps: int | None = None,
    learning_rate: float = 5e-5,
    keep: float = 0.5,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    scope: str = "matrix",
    write: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Pruned:
    """Fine-tune a model in place, and prune the entries whose weights training moves to zero.

    Over the steps each entry gathers a score, S = −Σ (∂L/∂W) W with the gradient of that step. The
    model is run on W·M, where the mask M keeps the highest scores, fewer and fewer of them along a
    cubic. The gradient at W·M is taken for that of W (straight through), so that what is masked
    still learns, and may come back. The optimizer is AdamW, without decay.

    The model's weights ARE trained: those of the modules, and all others that require gradients. If
    anything fails they are restored.

    Args:
        model: trained in place, in train mode.
        modules: linear modules that are pruned, as for :func:`tnlm.targets.select`.
        batches: ``input_ids``, ``attention_mask`` and ``labels``; drawn at random, and again where
            they are short.
        steps: one batch each; None for two passes over the batches.
        learning_rate: of AdamW, constant.
        keep: share of the entries that stays in the end.
        warmup: share of the steps before the first entries go.
        cooldown: share of the steps after the last went.
        scope: ``"matrix"``, the same share of every matrix, or ``"global"``, of all together.
        write: set masked weights to zero in the end; otherwise they are left as trained.
        seed: of the order of batches, and of dropout.
        progress: show a progress bar.

    Returns:
        The scores and the masks.

    Raises:
        OptionError: for an option out of range.
        BudgetError: for ``keep`` out of range.
        TargetError: if nothing matches, or a module is not linear.
        ModelError: if the model is compressed, or not finite.
        CalibrationError: if there are no batches, labels or predictions.
        TrainingError: if a loss, gradient or weight is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(16).reshape(2, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> found = movement_prune(model, ["c_fc"], [batch], keep=0.25, steps=4, progress=False)
        >>> found.masks["transformer.h.0.mlp.c_fc"].shape, found.kept
        (torch.Size([32, 8]), 0.25)
    """
    course = _Course(steps, learning_rate, keep, warmup, cooldown, scope, write, seed, progress)
    return _prune(model, modules, batches, course, moving=True)


def magnitude_prune(
    model: PreTrainedModel,
    modules: Selector,
    batches: Batches = (),
    *,
    steps: int | None = None,
    learning_rate: float = 5e-5,
    keep: float = 0.5,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    scope: str = "matrix",
    write: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Pruned:
    """Prune the smallest weights instead, all else being as in :func:`movement_prune`.

    Without batches, or with ``steps=0``, nothing is trained.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> magnitude_prune(model, ["c_fc"], keep=0.25).kept
        0.25
    """
    steps = 0 if not batches and steps is None else steps
    course = _Course(steps, learning_rate, keep, warmup, cooldown, scope, write, seed, progress)
    return _prune(model, modules, batches, course, moving=False)


@dataclass(frozen=True)
class _Course:
    """How a model is pruned; see `movement_prune`."""

    steps: int | None
    learning_rate: float
    keep: float
    warmup: float
    cooldown: float
    scope: str
    write: bool
    seed: int
    progress: bool

    def check(self, least: int) -> None:
        check_course(self.steps, least, self.learning_rate)
        if not 0 < self.keep <= 1:
            raise BudgetError(f"keep={self.keep!r}; allowed: a share above 0, at most 1")
        if not (self.warmup >= 0 <= self.cooldown and self.warmup + self.cooldown <= 1):
            raise OptionError(
                f"warmup={self.warmup!r}, cooldown={self.cooldown!r}; allowed: shares of the steps"
            )
        if self.scope not in SCOPES:
            raise OptionError(f"scope={self.scope!r}{did_you_mean(str(self.scope), SCOPES)}")

    def shares(self, steps: int) -> Callable[[int], float]:
        """Return the share of entries that is left at each step."""
        warmup = round(self.warmup * steps)
        cooldown = min(round(self.cooldown * steps), steps - warmup)
        return lambda step: cubic(step, steps, end=self.keep, warmup=warmup, cooldown=cooldown)


def _prune(
    model: PreTrainedModel, modules: Selector, batches: Batches, course: _Course, *, moving: bool
) -> Pruned:
    course.check(least=1 if moving else 0)
    check_model(model)
    targets = select(model, modules).targets
    for target in targets:
        if target.kind != "linear":
            raise TargetError(f"{target.name} is an {target.kind}; name linear modules alone")
    check_weights(model, targets)
    steps = 2 * len(batches) if course.steps is None else course.steps
    found = usable(model, batches) if steps or moving else ()
    entries = Entries(model, targets, moving, course.scope)
    own = {id(weight) for weight in entries.weights}
    trained = [p for p in model.parameters() if p.requires_grad or id(p) in own]
    with guarded(model, trained, course.seed):
        if steps:
            _train(model, found, trained, entries, course, steps)
        if moving:
            _warn_of_silence(entries)
        if not moving:
            entries.see()
        entries.keep(course.keep)
        if course.write:
            entries.write()
    return Pruned(entries.scores, entries.masks)


def _train(
    model: PreTrainedModel,
    batches: Batches,
    trained: Sequence[nn.Parameter],
    entries: Entries,
    course: _Course,
    steps: int,
) -> None:
    adam = torch.optim.AdamW(trained, lr=course.learning_rate, weight_decay=0.0)
    share = course.shares(steps)
    rounds = enumerate(in_turn(model, batches, steps))
    for step, batch in tqdm(
        rounds, total=steps, desc="pruning", unit="step", disable=not course.progress
    ):
        if step and share(step) < 1:  # before the first step nothing is known of any entry
            entries.keep(share(step))
        adam.zero_grad()
        with entries.masked():
            backward(model(**batch).loss, step, steps)
        entries.see()
        clip(trained, step, steps)
        adam.step()


def _warn_of_silence(entries: Entries) -> None:
    silent = [name for name, scores in entries.scores.items() if not bool(scores.any())]
    if silent:
        logger.warning(
            "the loss does not depend on %d of %d modules, first on %s: what is pruned there is "
            "arbitrary",
            len(silent),
            len(entries.modules),
            silent[0],
        )


def row_weights(scores: Tensor, mask: Tensor, floor: float = FLOOR) -> Tensor:
    """Return how much the error of each column of a pruned matrix counts, ``(in,)`` in float64.

    A column, which is one input (a row, where papers write xW), counts the sum of its kept entries'
    scores. Scores have signs, and the paper does not say what becomes of them: here an entry counts
    0 if it is masked, or if its score is negative, as the loss then falls when it shrinks. The sums
    are scaled to mean 1, and raised to ``floor``, so that no column is free.

    Args:
        scores: ``(out, in)``.
        mask: ``(out, in)``, True where an entry is kept.
        floor: smallest weight, relative to the mean. Where no score is positive all columns count
            the same.

    Raises:
        OptionError: if the shapes differ, a score is not finite, or the floor is no fraction.

    Example:
        >>> scores = torch.tensor([[3.0, -1.0, 0.5], [-1.0, 2.0, 0.5]])
        >>> row_weights(scores, scores > 0.6)
        tensor([1.8000e+00, 1.2000e+00, 1.0000e-06], dtype=torch.float64)
    """
    if scores.shape != mask.shape:
        raise OptionError(f"scores {tuple(scores.shape)} and a mask {tuple(mask.shape)} differ")
    if not bool(scores.isfinite().all()):
        raise OptionError("scores must be finite")
    if not 0 <= floor < 1:
        raise OptionError(f"floor={floor!r}; allowed: a fraction in [0, 1)")
    sums = scores.double().clamp_min(0.0).masked_fill(~mask.bool(), 0.0).sum(0)
    mean = float(sums.mean())
    return (sums / mean).clamp_min(floor) if mean > 0 else torch.ones_like(sums)


def movement_statistics(
    pruned: Pruned, targets: Sequence[Target], batches: Batches = ()
) -> Statistics:
    """Return the weights of columns as a statistic ``movement``, for a metric of that name.

    Args:
        pruned: what `movement_prune` found of these targets.
        targets: matrices; those of a fused module have weights of their own, ``(parts, in)``.
        batches: what was trained on, to be counted.
    """
    store = Statistics(tokens=count_tokens(batches))
    for target in targets:
        if target.part:  # a fused module is taken as a whole
            continue
        count = len(target.parts) or 1
        pairs = zip(
            pruned.scores[target.module].chunk(count),
            pruned.masks[target.module].chunk(count),
            strict=True,
        )
        weights = torch.stack([row_weights(*pair).cpu() for pair in pairs])
        store.put(
            target.module, [target.module], {"movement": weights if target.parts else weights[0]}
        )
    return store
