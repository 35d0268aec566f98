"""Importance of weights from a LoRA beside them: no gradient of a weight is ever held.

See `tnlm.calibration.lora_sums` for the formulae and their source.
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
from tnlm.calibration.store import Statistics, open_store
from tnlm.calibration.walk import eval_mode
from tnlm.errors import CalibrationError, OptionError, did_you_mean
from tnlm.layers.adapters import Adapter, Lora, attached, size_of
from tnlm.utils.checks import is_whole

SEEN = ("outputs", "inputs")
"""The side of a gradient that a LoRA at its start does not mix."""

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
    """Return row and column sums of weights' importance, and the LoRA that they come from.

    Examples are taken one by one: the importance is the mean over examples of a squared gradient
    (or Taylor term), as the Fisher information is, not the square of a mean. An example's loss is
    summed over its predictions. The model runs in eval mode, and is as before afterwards, also
    after a failure. It may be in half precision or quantized: gradients reach the LoRA alone.

    Args:
        model: with a loss, i.e. a head that takes ``labels``.
        modules: dotted names of linear layers.
        batches: ``input_ids``, ``attention_mask`` and ``labels``, so that ``model(**batch).loss``
            is the mean loss.
        rank: of the LoRA.
        alpha: its product is multiplied by ``alpha / rank``; the importance is freed from it.
        kind: ``"fisher"`` or ``"taylor"``, see :func:`importance_sums`.
        step: weight of the gradient's quadratic term, see :func:`lora_gradient`.
        sees: at its start a LoRA sees the gradient G through a projection, and one side of it
            unmixed. ``"outputs"``, the usual start with B at zero, sees ``G A.T A``: row sums are
            right on average, column sums are mostly those of ``A.T A``. ``"inputs"``, with A at
            zero and B orthonormal, sees ``B B.T G``, of which that holds the other way round.
        steps: steps of Adam in which the LoRA is trained meanwhile, one after each batch; batches
            are used again where there are fewer. 0 leaves it at its start.
        learning_rate: of Adam.
        decay: weight of the past in a moving average over examples, in (0, 1); None for a plain
            mean.
        parts: where the rows of each matrix are in a fused module, by its name.
        seed: draws what does not start at zero.
        progress: show a progress bar.

    Returns:
        By module name ``outputs`` ``(out,)`` and ``inputs`` ``(in,)``, float64 on the CPU, the
        latter ``(parts, in)`` for a fused module, of the modules that the loss reaches; and A, B
        and scaling at the end.

    Raises:
        OptionError: for an option out of range, or if PEFT is not installed.
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
    # A fused module's matrices get a block of B each, so that none is seen through another.
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
            _mirror(adapters, fused, seed)
        trainer = _Trainer(adapters, learning_rate)
        rounds = tqdm(
            islice(cycle(batches), count),
            total=count,
            desc="weighing by LoRA",
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


def _mirror(adapters: Mapping[str, Adapter], fused: Mapping[str, Parts], seed: int) -> None:
    """Start with A at zero and B orthonormal, in a block for each matrix of a fused module."""
    generator = torch.Generator().manual_seed(seed)
    for name, adapter in adapters.items():
        B = torch.zeros(adapter.B.shape, dtype=torch.float64)
        rank = B.shape[1] // len(fused[name])
        for part, rows in enumerate(fused[name]):
            drawn = torch.randn(len(B[rows]), rank, generator=generator, dtype=torch.float64)
            B[rows, part * rank : (part + 1) * rank] = torch.linalg.qr(drawn)[0]
        adapter.fill(Lora(torch.zeros_like(adapter.A), B, adapter.scaling))


class _Trainer:
    """Adam on the adapters, on the mean loss of a batch whose examples come one by one."""

    def __init__(self, adapters: Mapping[str, Adapter], learning_rate: float) -> None:
        self._parameters = [p for found in adapters.values() for p in (found.A, found.B)]
        self._adam = torch.optim.Adam(self._parameters, lr=learning_rate)
        self._totals: dict[int, Tensor] = {}
        self._predictions = 0

    def add(self, predictions: int) -> None:
        """Take over the gradients of an example."""
        self._predictions += predictions
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                total = self._totals.get(index)
                self._totals[index] = parameter.grad if total is None else total + parameter.grad
            parameter.grad = None

    def step(self) -> None:
        """Take a step on what was added."""
        for index, total in self._totals.items():
            self._parameters[index].grad = total / self._predictions
        self._adam.step()

    def clear(self) -> None:
        """Forget what was added."""
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
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Statistics:
    """Gather importances of columns, ``lora_inputs``, and of rows, ``lora_outputs``, into a store.

    Each comes from a LoRA that sees its side, at its start, and is multiplied by what a projection
    onto so few directions loses on average.

    Args:
        model: see :func:`collect_lora`.
        modules: where the rows of each matrix are in each module, by its name.
        batches: token batches; the labels are their own tokens.
        kind: ``"fisher"`` or ``"taylor"``.
        outputs: gather those of rows too, in a second pass.
        rank: of the LoRA; less where a matrix is smaller.
        seed: draws the LoRA's start.
        cache_dir: keep the statistics there, and use them again.
        progress: show a progress bar.
    """
    sizes = {name: size_of(model.get_submodule(name)) for name in modules}
    heights = {name: heights_of(modules[name], rows) for name, (rows, _) in sizes.items()}
    rank = min(rank, *(min(*h, sizes[name][1] // len(h)) for name, h in heights.items()))
    tokens = count_tokens(batches)
    settings = ("lora", kind, rank, outputs, seed, *heights.values())
    store = open_store(cache_dir, tokens, model, list(modules), batches, settings)
    if store.complete:
        return store
    data = with_labels(model, batches)
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for sees in SEEN if outputs else ("inputs",):
        found, _ = collect_lora(
            model,
            list(modules),
            data,
            rank=rank,
            kind=kind,
            sees=sees,
            parts=modules,
            seed=seed,
            progress=progress,
        )
        for name, sums in found.items():
            tall = torch.tensor(heights[name], dtype=torch.float64)
            lost = tall.unsqueeze(1) if sees == "inputs" and len(tall) > 1 else tall
            lost = lost if sees == "inputs" else torch.tensor(float(sizes[name][1]))
            tensors[name][f"lora_{sees}"] = sums[sees] * (lost / rank)
    for name, held in tensors.items():
        if held:
            store.put(name, [name], held)
    store.save_index()
    return store


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
