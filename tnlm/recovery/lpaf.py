"""LPAF in one call: movement pruning, a sparsity-aware SVD, and mixed-rank fine-tuning.

Unlike the rest of this folder it stands above the pipeline, whose job and swap it uses.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.data import count_tokens
from tnlm.job import Supplied
from tnlm.pipeline import compress_with
from tnlm.recovery.loop import Batches, check_course, usable
from tnlm.recovery.mixed_rank import check_probability, mixed_rank_finetune
from tnlm.recovery.movement import movement_prune, movement_statistics
from tnlm.request import make_request
from tnlm.targets import Selector, Target, check_model, select


def lpaf(
    model: PreTrainedModel,
    batches: Batches,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    tolerance: float | None = None,
    prune_keep: float = 0.5,
    prune_steps: int | None = None,
    prune_learning_rate: float = 5e-5,
    warmup: float = 0.1,
    cooldown: float = 0.1,
    scope: str = "matrix",
    tune_steps: int | None = None,
    tune_learning_rate: float = 5e-5,
    start: float = 0.5,
    consistency: float = 1.0,
    train_dense: bool = False,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Compress a model in place by LPAF, and return it.

    A copy of the model is fine-tuned and pruned where its weights move towards zero; low rank is
    fitted to what is left, columns weighed by the scores of the entries that stay; and the factors
    are fine-tuned with the pruned weights beside them. What comes out is an ordinary compressed
    model. ``tnlm.compress(model, "lpaf", calibration=...)`` does the same from texts, with as many
    steps as ``recover_tokens`` gives; here every setting is open. If anything fails, the model is
    left as it was.

    The paper does not publish its settings: all defaults are tnlm's own.

    Args:
        model: any Hugging Face model with a loss, not quantized; most often fine-tuned on the task.
        batches: the task's ``input_ids``, ``attention_mask`` and ``labels``.
        targets: the matrices; see :func:`tnlm.targets.select`.
        ignore: matrices left alone.
        keep: fraction of the whole model's parameters that remains.
        keep_targets: fraction of the targets' parameters that remains (0.8 if nothing is asked).
        tolerance: relative error allowed to every matrix, in the metric.
        prune_keep: share of the targets' entries that pruning leaves.
        prune_steps: of pruning; None for two passes over the batches.
        prune_learning_rate: of AdamW while pruning.
        warmup: share of the pruning steps before the first entries go.
        cooldown: share of the pruning steps after the last went.
        scope: ``"matrix"`` or ``"global"``; see `tnlm.recovery.movement.movement_prune`.
        tune_steps: of mixed-rank fine-tuning; None for two passes, 0 for none.
        tune_learning_rate: of AdamW while fine-tuning, at its highest.
        start: probability of a dense weight at the start of fine-tuning.
        consistency: weight of the divergence between two passes.
        train_dense: whether the dense weights are fine-tuned, too.
        seed: of all that is drawn.
        progress: show progress bars.
        **options: the format's own: ``rank``, ``gauge``.

    Returns:
        The same model, whose chosen modules are factorized.

    Raises:
        TnlmError: one of its children.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> ids = torch.arange(16).reshape(2, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> model = lpaf(LlamaForCausalLM(tiny), [batch], keep_targets=0.5, progress=False)
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'FactorizedLinear'
    """
    check_model(model)
    check_course(tune_steps, 0, tune_learning_rate)
    check_probability("start", start)
    found = usable(model, batches)
    prune_steps, tune_steps = (
        2 * len(found) if steps is None else steps for steps in (prune_steps, tune_steps)
    )
    request = make_request(
        "lpaf",
        recover="mixed-rank" if tune_steps else "none",
        # At least 1, as wrong numbers are refused where they are used.
        recover_tokens=max(1, (tune_steps or prune_steps) * count_tokens(found) // len(found)),
        keep=keep,
        keep_targets=keep_targets,
        tolerance=tolerance,
        options=options,
    )
    targets = request.scheme.targets if targets is None else targets
    common: dict[str, Any] = {"batches": found, "seed": seed, "progress": progress}
    supplied = _pruned(
        model,
        [target for target in select(model, targets, ignore).targets if target.kind == "linear"],
        steps=prune_steps,
        learning_rate=prune_learning_rate,
        keep=prune_keep,
        warmup=warmup,
        cooldown=cooldown,
        scope=scope,
        **common,
    )
    tune = partial(
        mixed_rank_finetune,
        steps=tune_steps,
        learning_rate=tune_learning_rate,
        start=start,
        consistency=consistency,
        train_dense=train_dense,
        **common,
    )
    supplied = replace(supplied, recover=tune)
    return compress_with(
        model, request, supplied, targets=targets, ignore=ignore, progress=progress
    )


def _pruned(
    model: PreTrainedModel, targets: Sequence[Target], batches: Batches, **course: Any
) -> Supplied:
    """Train and prune a copy of a model."""
    start = time.perf_counter()
    source = copy.deepcopy(model)
    modules = list(dict.fromkeys(target.module for target in targets))
    found = movement_prune(source, modules, batches, **course)
    statistics = movement_statistics(found, targets, batches)
    return Supplied(source, statistics, seconds={"prune": time.perf_counter() - start})
