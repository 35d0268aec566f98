"""A ``transformers.Trainer`` that stops if the loss is not finite, and does not print."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tnlm.calibration.walk import eval_mode
from tnlm.errors import TrainingError

logger = logging.getLogger("tnlm")

SNAPSHOTS = 20
"""Number of times per training that parameters are saved, to be restored if the loss diverges."""


class GuardedTrainer(Trainer):
    """A Trainer that restores the model and raises an error if the loss is not finite.

    It restores the last saved parameters with a finite loss, which it saves every 5 % of the steps,
    in CPU memory of the size of the trained parameters.
    """

    def __init__(self, **arguments: Any) -> None:
        """Take a Trainer's arguments; progress bars show only steps, and logs go to logging."""
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Bar)
        self.add_callback(_Log)
        self._kept: dict[str, Tensor] = {}
        self._kept_at = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """Further settings, as JSON values, that must match for a training to be resumed."""
        return {}

    def train(self, *args: Any, **arguments: Any) -> Any:
        """Train like a Trainer.

        Raises:
            TrainingError: if the loss, or a final parameter, is not finite.
        """
        self._kept = {}
        if self.args.gradient_accumulation_steps > 1 and self.loss_is_scaled_for_ga is None:
            self.loss_is_scaled_for_ga = self._model_divides()
        result = super().train(*args, **arguments)
        if not all(bool(parameter.isfinite().all()) for _, parameter in self._trained()):
            self._stop("a parameter is not finite after the last update")
        self._kept = {}
        return result

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the gradients of a batch, if its loss is finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            self._stop(f"the loss is {float(loss)}")
        step = self.state.global_step
        if not self._kept or step >= self._kept_at + max(1, self.state.max_steps // SNAPSHOTS):
            self._kept = {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}
            self._kept_at = step
        return loss

    def _model_divides(self) -> bool | None:
        """Return whether the model divides its loss by the number of labels it is given.

        Many models accept this argument and still return the mean, and the Trainer would then sum
        the means of accumulated batches. If unknown, return None, the Trainer's own choice.
        """
        model: Any = self.model
        data: Any = self.train_dataset
        if not self.model_accepts_loss_kwargs:
            return None
        rows = [data[i] for i in range(min(len(data), self.args.per_device_train_batch_size))]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), eval_mode(model), torch.no_grad():
            batch = self._prepare_inputs(self.data_collator(rows))
            mean = model(**batch).loss
            given = model(**batch, num_items_in_batch=2 * batch["labels"].numel()).loss
        if not bool(mean.isfinite()):
            return None
        return not torch.equal(mean, given)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        model: Any = self.model  # typed as if it could be None
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def _stop(self, why: str) -> None:
        """Restore the parameters, and raise an error that names the step."""
        with torch.no_grad():
            for name, parameter in self._trained():
                if self._kept:
                    parameter.copy_(self._kept[name])
        advice = (
            f"the parameters of step {self._kept_at} are restored; try a lower learning_rate than "
            f"{self.args.learning_rate}"
            if self._kept
            else "no step was taken; the model itself has no finite loss on this data"
        )
        raise TrainingError(
            f"training {type(self.model).__name__}: {why} at step {self.state.global_step} of "
            f"{self.state.max_steps}; {advice}"
        )


class _Log(TrainerCallback):
    """Logs the Trainer's reports."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        shown = (f"{k} {v:.4g}" for k, v in (logs or {}).items() if isinstance(v, float | int))
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(shown))


class _Bar(ProgressCallback):
    """Shows a progress bar of the steps, without printing logs."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass
