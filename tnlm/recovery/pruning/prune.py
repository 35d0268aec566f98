"""Structured pruning while adapters are trained: removes heads and channels, and adapts the rest.

Source: LoRAPrune (Zhang et al., Findings of ACL 2024, arXiv 2305.18403). Since a config has one
size for all blocks, all are pruned alike; the published code skips the first tenth and the last. It
also applies dropout to the inputs of adapters, which is omitted here.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.blocks import find_blocks, split
from tnlm.calibration.data import fingerprint
from tnlm.calibration.labels import check_are_batches, count_predictions
from tnlm.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    OptionError,
    TrainingError,
    did_you_mean,
)
from tnlm.layers.adapters import Adapter, attached
from tnlm.layers.adapters import check as check_ranks
from tnlm.parallel.ranks import count
from tnlm.parallel.workers import Workers
from tnlm.recovery.pruning.groups import CHANNELS, HEADS, find_groups
from tnlm.recovery.pruning.importance import KINDS, importances
from tnlm.recovery.pruning.independence import check_heads
from tnlm.recovery.pruning.masks import Masks
from tnlm.recovery.pruning.schedule import cubic
from tnlm.recovery.pruning.sizes import changes, settle
from tnlm.recovery.pruning.slicing import cut_groups, smaller
from tnlm.recovery.sharing import average, team
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.selection import select
from tnlm.utils.training_flags import modes_kept
from tnlm.utils.undo import leaves_model

logger = logging.getLogger("tnlm")

LARGEST = 1.0
"""Norm to which the gradients of all adapters are clipped together."""


@leaves_model
def prune(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    keep: float = 0.5,
    heads: bool = True,
    channels: bool = True,
    steps: int | None = None,
    rank: int = 8,
    alpha: int = 16,
    learning_rate: float = 1e-4,
    decay: float = 0.9,
    every: int = 10,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    kind: str = "taylor",
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """Prune attention heads and feed-forward channels while LoRA adapters are trained.

    The base model is frozen. At each step, the gradients of the adapters show how important each
    group is, and the least important groups of every block are masked, following a cubic schedule.
    In the end, the adapters are merged and the masked groups are cut out. The result is an ordinary
    model of the same class with a smaller config, which plain transformers saves and loads.

    Args:
        model: changed in place, but only at the very end.
        batches: ``input_ids``, ``attention_mask`` and ``labels``; used repeatedly in random order.
        keep: most parameters to keep in the blocks' linear layers, as a fraction.
        heads: whether to prune key/value heads, each with the query heads that share it.
        channels: whether to prune feed-forward channels.
        steps: number of steps of one batch each; None for two passes over the batches. Under
            ``torchrun`` each process takes one batch of a step.
        rank: rank of the adapters.
        alpha: the scaling of the adapters is alpha / rank.
        learning_rate: constant learning rate of AdamW.
        decay: decay of the moving average of importance.
        every: steps between two updates of the masks.
        warmup: fraction of the steps before masking starts.
        cooldown: fraction of the steps after masking ends.
        kind: ``"taylor"`` for ``|ĝ w|`` as in the published code, or ``"squared"`` for (ĝ w)² as in
            the paper.
        seed: seed of the adapters, the order of batches, and dropout.
        progress: show a progress bar.

    Returns:
        The model.

    Raises:
        OptionError: if an option is out of range, the model's heads or channels cannot be pruned,
            or peft is missing.
        BudgetError: if ``keep`` is out of range or cannot be reached.
        RankError: if a matrix is smaller than ``rank``.
        ModelError: if the model is compressed, not finite, not one stack of blocks, or computes no
            loss; if its config cannot express the sizes; or if heads or channels are not
            independent, as when an activation takes a mean over channels.
        CalibrationError: if there are no batches, or they have no labels.
        TrainingError: if a loss or gradient is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2))
        >>> ids = torch.arange(16).reshape(2, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> small = prune(model, [batch], keep=0.5, rank=2, steps=4, progress=False)
        >>> small.config.num_key_value_heads, small.config.intermediate_size
        (1, 8)
    """
    check_are_batches(batches)
    course = _Course(
        steps=-(-2 * len(batches) // max(count(), 1)) if steps is None else steps,
        learning_rate=learning_rate,
        every=every,
        warmup=warmup,
        cooldown=cooldown,
        kind=kind,
        seed=seed,
        progress=progress,
    )
    _check(batches, keep, decay, alpha, course)
    modules = _linear(model)
    ranks = dict.fromkeys(modules, rank)
    check_ranks(model, ranks)
    asked = [name for name, wanted in ((HEADS, heads), (CHANNELS, channels)) if wanted]
    if not asked:
        raise OptionError("heads=False and channels=False leave nothing to prune; enable one")
    groups = {name: find_groups(model, modules, name) for name in asked}
    firsts = {name: blocks[0] for name, blocks in groups.items()}
    counts = settle(model, groups, modules, keep)
    values = changes(model, firsts, counts)
    every_group = [block for blocks in groups.values() for block in blocks]
    template = smaller(model, every_group, counts, values)
    if heads:
        check_heads(model, groups[HEADS], counts[HEADS], template, batches[0])
    masks = Masks(every_group, decay)
    sizes = {name: (block.count, counts[name]) for name, block in firsts.items()}
    logger.info("pruning every block, from and to, by kind: %s", sizes)
    with (
        _seeded(model, seed),
        attached(model, ranks, alpha / rank, seed) as adapters,
        masks.applied(model),
    ):
        alike = replace(course, progress=False)
        with team() as workers:
            workers.check_same(data=fingerprint(map(dict, batches)), sizes=sizes, course=alike)
            _train(model, batches, adapters, masks, sizes, course, workers)
    weights = {name: adapter.merged for name, adapter in adapters.items()}
    cut_groups(model, template, masks.kept(), values, weights)
    return model


@dataclass(frozen=True)
class _Course:
    """The settings of the training."""

    steps: int
    learning_rate: float
    every: int
    warmup: float
    cooldown: float
    kind: str
    seed: int
    progress: bool


def _check(
    batches: Sequence[Mapping[str, Tensor]],
    keep: float,
    decay: float,
    alpha: float,
    course: _Course,
) -> None:
    if not batches or any("labels" not in batch for batch in batches):
        raise CalibrationError(
            f"{len(batches)} batches; allowed: at least one, each with input_ids, attention_mask "
            "and labels"
        )
    if not 0 < keep < 1:
        raise BudgetError(f"keep={keep}; allowed: a fraction in (0, 1)")
    if course.kind not in KINDS:
        raise OptionError(f"kind={course.kind!r}{did_you_mean(str(course.kind), KINDS)}")
    if not 0 <= decay < 1:
        raise OptionError(f"decay={decay}; allowed: a number in [0, 1)")
    if not 0 < alpha < math.inf:
        raise OptionError(f"alpha={alpha}; allowed: a positive number")
    if not 0 < course.learning_rate < math.inf:
        raise OptionError(f"learning_rate={course.learning_rate}; allowed: a positive number")
    if course.steps < 1 or course.every < 1:
        raise OptionError(f"steps={course.steps}, every={course.every}; allowed: at least 1")
    if min(course.warmup, course.cooldown) < 0 or course.warmup + course.cooldown > 1:
        raise OptionError(
            f"warmup={course.warmup}, cooldown={course.cooldown}; allowed: fractions of the steps"
        )


def _linear(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear modules inside the model's blocks."""
    check_model(model)
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} computes no loss; load it with its head")
    targets = select(model).targets
    check_weights(model, targets)
    names = list(dict.fromkeys(target.module for target in targets))
    blocks = find_blocks(model, names)
    if not blocks:
        raise ModelError(f"{type(model).__name__} is not a single stack of blocks")
    return split(names, blocks)[0]


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed torch for a block that trains; restore its generators and the modules' flags after."""
    devices = [model.device] if model.device.type == "cuda" else []
    with modes_kept(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _train(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    adapters: Mapping[str, Adapter],
    masks: Masks,
    sizes: Mapping[str, tuple[int, int]],
    course: _Course,
    workers: Workers,
) -> None:
    """Train the adapters and mask groups, from the first to the second of the sizes by kind."""
    parameters = [p for adapter in adapters.values() for p in (adapter.A, adapter.B)]
    adam = torch.optim.AdamW(parameters, lr=course.learning_rate, weight_decay=0.0)
    warmup = round(course.warmup * course.steps)
    cooldown = min(round(course.cooldown * course.steps), course.steps - warmup)
    rows = workers.mine(_rows(len(batches), course, workers.size))
    model.train()
    hidden = not course.progress or workers.rank > 0
    bar = tqdm(enumerate(rows, 1), total=course.steps, desc="pruning", disable=hidden)
    for step, row in bar:
        adam.zero_grad()
        _backward(model, batches[row], parameters, step, workers)
        masks.see(partial(importances, adapters=adapters, kind=course.kind))
        adam.step()
        if step % course.every == 0 or step >= course.steps - cooldown:
            now = partial(cubic, step, course.steps, warmup=warmup, cooldown=cooldown)
            masks.shrink({name: now(start=a, end=b) for name, (a, b) in sizes.items()})


def _rows(batches: int, course: _Course, processes: int) -> list[int]:
    """Return the batches of all steps, one for each process: all of them, over and over."""
    generator = torch.Generator().manual_seed(course.seed)
    rows: list[int] = []
    while len(rows) < course.steps * processes:
        rows += reversed(torch.randperm(batches, generator=generator).tolist())
    return rows[: course.steps * processes]


def _backward(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    parameters: Sequence[torch.nn.Parameter],
    step: int,
    workers: Workers,
) -> None:
    """Compute the gradients of a batch's loss over all processes, and clip them."""
    with torch.enable_grad():
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        loss: Tensor | None = model(**inputs).loss
        if loss is None or not bool(loss.isfinite()):
            value = None if loss is None else float(loss.detach())
            raise TrainingError(f"the loss at step {step} is {value}; nothing was changed")
        loss.backward()
    average(parameters, count_predictions(model, batch["labels"]), workers)
    norm = torch.nn.utils.clip_grad_norm_(parameters, LARGEST)
    if not bool(norm.isfinite()):
        raise TrainingError(f"the gradients at step {step} are not finite; nothing was changed")
