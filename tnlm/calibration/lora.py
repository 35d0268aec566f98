"""Importance of weights from the gradients of a LoRA, without any gradient of a weight.

See `tnlm.calibration.lora_sums` for the formulas and their source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.labels import check_labels, count_predictions, examples, with_labels
from tnlm.calibration.lora_parts import own_factors, start_apart
from tnlm.calibration.lora_sums import (
    WHOLE,
    Importance,
    Parts,
    Sums,
    check_kind,
    heights_of,
    importance_sums,
    lora_gradient,
)
from tnlm.calibration.opening import open_store
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import eval_mode
from tnlm.errors import CalibrationError, OptionError, did_you_mean
from tnlm.layers.adapters import Adapter, Lora, attached, size_of
from tnlm.utils.checks import is_whole

SEEN = ("outputs", "inputs")
"""The side of the gradient that a LoRA, as initialised, does not project."""

__all__ = ["collect_lora", "importance_sums", "lora_gradient", "lora_statistics"]


def collect_lora(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    kind: str = "fisher",
    step: float = 0.0,
    sees: str = "outputs",
    steps: int = 0,
    learning_rate: float = 1e-4,
    decay: float | None = None,
    parts: Mapping[str, Parts] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Importance, dict[str, Lora]]:
    """Return row and column sums of weights' importance, and the LoRA from which they come.

    Examples are processed one by one: like the Fisher information, the importance is the mean over
    examples of a squared gradient (or Taylor term), not the square of a mean. An example's loss is
    summed over its predictions. The model runs in eval mode and is restored afterwards, even after
    a failure. It may be in half precision or quantized, since only the LoRA gets gradients.

    Args:
        model: a model with a loss, i.e. a head that accepts ``labels``.
        modules: dotted names of linear layers.
        batches: ``input_ids``, ``attention_mask`` and ``labels``, such that ``model(**batch).loss``
            is the mean loss.
        rank: rank of the LoRA.
        alpha: the LoRA's product is multiplied by ``alpha / rank``; the importance does not depend
            on it.
        kind: ``"fisher"`` or ``"taylor"``, see :func:`importance_sums`.
        step: weight of the gradient's quadratic term, see :func:`lora_gradient`.
        sees: the side of the gradient G that is exact, as the LoRA projects the other. With
            ``"outputs"``, the usual start with B at zero, the LoRA's gradients give ``G A.T A``:
            row sums are right on average, column sums are mostly those of ``A.T A``. With
            ``"inputs"``, A starts at zero and B is orthonormal, which gives ``B B.T G``, with the
            sides exchanged.
        steps: number of Adam steps that train the LoRA meanwhile, one after each batch; batches
            are repeated if there are fewer. 0 leaves the LoRA as initialised.
        learning_rate: learning rate of Adam.
        decay: decay of a moving average over examples, in (0, 1); None for a plain mean.
        parts: rows of each matrix in a fused module, by the module's name.
        seed: seed of the factor that does not start at zero.
        progress: show a progress bar.

    Returns:
        By module name, ``outputs`` ``(out,)`` and ``inputs`` ``(in,)``, float64 on the CPU, the
        latter ``(parts, in)`` for a fused module, for the modules that the loss reaches; and the
        final A, B and scaling.

    Raises:
        OptionError: if an option is out of range, or PEFT is not installed.
        RankError: if a matrix is too small for the rank.
        CalibrationError: if there is no batch, no label or no prediction, no module is reached, or
            a loss or gradient is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> ids = torch.arange(8).reshape(1, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> name = "transformer.h.0.mlp.c_fc"
        >>> found, loras = collect_lora(model, [name], [batch], rank=2, progress=False)
        >>> found[name]["outputs"].shape, found[name]["inputs"].shape, loras[name].A.shape
        (torch.Size([16]), torch.Size([4]), torch.Size([2, 4]))
    """
    check_kind(kind)
    check_labels(model, batches)
    _check_numbers(steps, learning_rate, decay)
    _check_numbers_of_lora(rank, alpha)
    if sees not in SEEN:
        raise OptionError(f"sees={sees!r}{did_you_mean(str(sees), SEEN)}")
    fused = {name: (parts or {}).get(name, WHOLE) for name in modules}
    # Each matrix of a fused module has its own block of B, so that their gradients do not mix.
    ranks = {name: rank * (len(fused[name]) if sees == "inputs" else 1) for name in modules}
    sums = Sums(kind, step, decay, fused)
    count = max(len(batches), steps)
    with (
        attached(model, ranks, alpha / rank, seed) as adapters,
        eval_mode(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        if sees == "inputs":
            start_apart(adapters, fused, seed)
        trainer = _Trainer(adapters, learning_rate)
        rounds = tqdm(
            islice(cycle(batches), count),
            total=count,
            desc="weighting by LoRA",
            unit="batch",
            disable=not progress,
        )
        for number, batch in enumerate(rounds):
            for example in examples(model, batch):
                predictions = count_predictions(model, example["labels"])
                if predictions:
                    _backward(model, example, predictions, f"batch {number}")
                    sums.add(adapters, f"batch {number}")
                    trainer.add(predictions)
            if number < steps:
                trainer.step()
            trainer.clear()
        return sums.means(adapters), {name: found.lora() for name, found in adapters.items()}


class _Trainer:
    """Adam on the adapters, for the mean loss of a batch whose examples come one by one."""

    def __init__(self, adapters: Mapping[str, Adapter], learning_rate: float) -> None:
        self._parameters = [p for found in adapters.values() for p in (found.A, found.B)]
        self._adam = torch.optim.Adam(self._parameters, lr=learning_rate)
        self._totals: dict[int, Tensor] = {}
        self._predictions = 0

    def add(self, predictions: int) -> None:
        """Add the gradients of an example."""
        self._predictions += predictions
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                total = self._totals.get(index)
                self._totals[index] = parameter.grad if total is None else total + parameter.grad
            parameter.grad = None

    def step(self) -> None:
        """Take a step with the added gradients."""
        for index, total in self._totals.items():
            self._parameters[index].grad = total / self._predictions
        self._adam.step()

    def clear(self) -> None:
        """Discard the added gradients."""
        self._adam.zero_grad()
        self._totals.clear()
        self._predictions = 0


def _backward(
    model: PreTrainedModel, example: Mapping[str, Tensor], predictions: int, where: str
) -> None:
    loss = model(**example).loss * predictions
    value = float(loss.detach())
    if not math.isfinite(value):
        raise CalibrationError(f"the loss is {value} on {where}; check the weights and dtype")
    if loss.requires_grad:
        loss.backward()


def lora_statistics(
    model: PreTrainedModel,
    modules: Mapping[str, Parts],
    batches: Sequence[Batch],
    *,
    kind: str = "fisher",
    outputs: bool = False,
    rank: int = 8,
    step: float = 0.0,
    steps: int = 0,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    keep: bool = False,
) -> Statistics:
    """Gather the importance of columns, ``lora_inputs``, and of rows, ``lora_outputs``.

    Each comes from a LoRA for which this side is exact at its start, and is scaled to compensate
    for the average loss of a projection onto so few directions.

    Args:
        model: see :func:`collect_lora`.
        modules: rows of each matrix in each module, by the module's name.
        batches: token batches; the labels are their own tokens.
        kind: ``"fisher"`` or ``"taylor"``.
        outputs: whether to gather the importance of rows too, in a second pass.
        rank: rank of the LoRA; lower if a matrix is smaller.
        step: weight of the gradient's quadratic term.
        steps: number of steps that train the LoRA meanwhile.
        seed: seed of the LoRA.
        cache_dir: cache of the statistics.
        progress: show a progress bar.
        keep: whether to keep the LoRA as well, see :func:`tnlm.calibration.lora_parts.own_factors`.
    """
    sizes = {name: size_of(model.get_submodule(name)) for name in modules}
    heights = {name: heights_of(modules[name], rows) for name, (rows, _) in sizes.items()}
    rank = min(rank, *(min(*h, sizes[name][1] // len(h)) for name, h in heights.items()))
    tokens = count_tokens(batches)
    trained = (step, steps, keep, "apart") if step or steps or keep else ()
    settings = ("lora", kind, rank, outputs, seed, *trained, *heights.values())
    store = open_store(cache_dir, tokens, model, list(modules), batches, settings)
    if store.complete:
        return store
    data = with_labels(model, batches)
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for sees in SEEN if outputs else ("inputs",):
        found, loras = collect_lora(
            model,
            list(modules),
            data,
            rank=rank,
            kind=kind,
            step=step,
            sees=sees,
            steps=steps,
            parts=modules,
            seed=seed,
            progress=progress,
        )
        for name, sums in found.items():
            whole = _dimensions(sees, heights[name], sizes[name][1])
            tensors[name][f"lora_{sees}"] = sums[sees] * (whole / rank)
            if keep:
                tensors[name] |= own_factors(loras[name], list(modules[name]))
    for name, held in tensors.items():
        if held:
            store.put(name, [name], held)
    store.save_index()
    return store


def _dimensions(sees: str, heights: Sequence[int], columns: int) -> Tensor:
    """Return how many directions there are, of which the LoRA's rank keeps some, by matrix."""
    if sees != "inputs":
        return torch.tensor(float(columns))
    tall = torch.tensor(heights, dtype=torch.float64)
    return tall.unsqueeze(1) if len(tall) > 1 else tall


def _check_numbers(steps: int, learning_rate: float, decay: float | None) -> None:
    if not is_whole(steps) or steps < 0:
        raise OptionError(f"steps={steps!r}; allowed: a whole number, 0 for no training")
    if not 0 < learning_rate < math.inf:
        raise OptionError(f"learning_rate={learning_rate!r}; allowed: a number above 0")
    if decay is not None and not 0 < decay < 1:
        raise OptionError(f"decay={decay!r}; allowed: None, or a number between 0 and 1")


def _check_numbers_of_lora(rank: int, alpha: float) -> None:
    if not is_whole(rank) or rank < 1:
        raise OptionError(f"rank={rank!r}; allowed: a whole number >= 1")
    if not 0 < alpha < math.inf:
        raise OptionError(f"alpha={alpha!r}; allowed: a number above 0")
