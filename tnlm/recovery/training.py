"""Training of a compressed model: a plain `transformers.Trainer`, and what keeps it safe."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tnlm.errors import ModelError, OptionError, TrainingError
from tnlm.recovery.examples import MANY, Example, collate, examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("tnlm")

LEARNING_RATE = 1e-4
KEPT_EVERY = 10
"""Steps after which the weights are kept, to go back to if the loss stops being finite."""
PARTS = ("all", "factors")


class SteadyTrainer(Trainer):
    """A `Trainer` that stops at a loss that is not finite, and goes back to good weights.

    Attributes:
        logged: every term of the loss by name, a list with one number for each step.
    """

    def __init__(self, **arguments: Any) -> None:
        """Take a Trainer's arguments."""
        super().__init__(**arguments)
        self.logged: dict[str, list[float]] = {}
        self._kept: list[Tensor] = []
        self._kept_at = -1

    def terms(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name; here the model's own."""
        return {"loss": model(**inputs).loss}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the sum of the terms.

        Raises:
            TrainingError: if it is not finite.
        """
        found = self.terms(model, inputs)
        loss = torch.stack(list(found.values())).sum()
        step = self.state.global_step
        if not bool(loss.detach().isfinite()):
            self._go_back()
            values = ", ".join(f"{k} {float(value.detach()):g}" for k, value in found.items())
            raise TrainingError(
                f"the loss at step {step} is not finite ({values}); the weights are those of step "
                f"{max(self._kept_at, 0)}; try a lower learning_rate"
            )
        if step >= self._kept_at + KEPT_EVERY or self._kept_at < 0:
            self._kept = [p.detach().clone() for p in self._trained()]
            self._kept_at = step
        for name, value in found.items():
            self.logged.setdefault(name, []).append(float(value.detach()))
        return (loss, None) if return_outputs else loss

    def _trained(self) -> list[nn.Parameter]:
        model: Any = self.model
        return [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def _go_back(self) -> None:
        for parameter, good in zip(self._trained(), self._kept, strict=False):
            parameter.copy_(good)


def finetune(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 200_000,
    epochs: float | None = None,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 8,
    max_length: int = 512,
    train: str = "all",
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> PreTrainedModel:
    """Train a model in place on data, and return it.

    It is `transformers.Trainer` with a cosine schedule and a warm-up of a tenth of the steps; any
    other set-up of it works on a compressed model as well.

    Args:
        model: compressed or not; a causal or masked language model, or a classifier.
        data: as for :func:`tnlm.compress`; for a classifier rows from ``tnlm.labelled``.
        tokenizer: needed for texts, and for masked language models.
        tokens: tokens it is trained on; the data is used again where it is short.
        epochs: instead of ``tokens``, how often it sees all data.
        learning_rate: of AdamW, at its highest.
        batch_size: examples in a step.
        max_length: tokens of an example.
        train: ``"all"`` parameters, or ``"factors"``: only those of layers that tnlm made.
        output_dir: keeps checkpoints, from which an interrupted run goes on to the same result.
        seed: of the order of examples, and of masks.
        progress: show a progress bar.
        **arguments: more of `transformers.TrainingArguments`.

    Raises:
        OptionError: for counts or rates out of range.
        ModelError: if nothing is to be trained.
        TrainingError: if the loss stops being finite; the model keeps the last good weights.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> data = torch.arange(64) % 16
        >>> model = finetune(model, data, tokens=64, max_length=8, progress=False)
    """
    found = examples(
        model, data, tokenizer, max_length=max_length, most=enough(tokens, epochs, max_length)
    )
    with trainable(model, train):
        run(
            SteadyTrainer,
            model,
            found,
            tokens=tokens,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            output_dir=output_dir,
            seed=seed,
            progress=progress,
            **arguments,
        )
    return model


def enough(tokens: int, epochs: float | None, max_length: int) -> int:
    """Return how many examples are enough, so that no more are tokenised than are used."""
    if not isinstance(tokens, int) or tokens < 1:
        raise OptionError(f"tokens={tokens!r}; allowed: a whole number >= 1")
    return MANY if epochs is not None else max(1, math.ceil(tokens / max_length))


@contextlib.contextmanager
def trainable(model: PreTrainedModel, train: str) -> Iterator[None]:
    """Let gradients reach the chosen parameters only, and leave all flags as they were."""
    if train not in PARTS:
        raise OptionError(f"train={train!r}; allowed: {', '.join(PARTS)}")
    flags = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if train == "factors":
        config = getattr(model.config, "quantization_config", None)
        names = tuple(f"{name}." for name in getattr(config, "modules", {}))
        if not names:
            raise ModelError("train='factors' of a model that tnlm did not compress")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name.startswith(names))
    try:
        yield
    finally:
        for parameter, flag in needed:
            parameter.requires_grad_(flag)
        for module, mode in flags:
            module.training = mode


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Give all generators their states back: a Trainer seeds them."""
    plain, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)  # noqa: NPY002


def run(
    trainer: type[SteadyTrainer],
    model: PreTrainedModel,
    found: Sequence[Example],
    *,
    tokens: int,
    epochs: float | None,
    learning_rate: float,
    batch_size: int,
    output_dir: str | Path | None,
    seed: int,
    progress: bool,
    extra: dict[str, Any] | None = None,
    **arguments: Any,
) -> SteadyTrainer:
    """Run a Trainer over examples; the parameters that require gradients are trained.

    Returns:
        The trainer, whose ``logged`` has the terms of the loss.
    """
    if batch_size < 1 or not 0 < learning_rate < math.inf:
        raise OptionError(f"batch_size={batch_size}, learning_rate={learning_rate}: both above 0")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("no parameter of the model requires gradients: nothing is to be trained")
    held = sum(len(row["input_ids"]) for row in found)
    wanted = epochs * held if epochs is not None else tokens
    steps = max(1, math.ceil(wanted * len(found) / held / batch_size))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_randomness())
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="tnlm-"))
        settings: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 10),
            "weight_decay": 0.0,
            "logging_strategy": "no",
            "save_strategy": "no" if output_dir is None else "steps",
            "save_steps": max(1, steps // 10),
            "save_total_limit": 2,
            "report_to": [],
            "disable_tqdm": not progress,
            "seed": seed,
            "use_cpu": model.device.type == "cpu",
            "remove_unused_columns": False,
            "dataloader_pin_memory": model.device.type == "cuda",
        }
        made = trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
            train_dataset=list(found),
            data_collator=collate,
            **(extra or {}),
        )
        made.remove_callback(PrinterCallback)
        last = get_last_checkpoint(str(folder)) if output_dir and Path(folder).is_dir() else None
        made.train(resume_from_checkpoint=last)
    logger.info("trained %d steps: %s", steps, {k: v[-1] for k, v in made.logged.items() if v})
    return made
