"""What adapters are trained for: the data's labels, or the predictions of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.inputs import IGNORED
from tnlm.calibration.labels import count_predictions
from tnlm.calibration.passes import run
from tnlm.errors import ModelError, OptionError
from tnlm.recovery.lessons import logit_loss
from tnlm.targets.ends import vocabulary_of

Batch = Mapping[str, Tensor]
Goal = Callable[[PreTrainedModel, Batch], Tensor]
"""Returns the mean loss of a model on a batch."""

HELD_OUT = 16
"""One batch in so many is not trained on, to see whether training towards a teacher helps."""


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the model's loss with the labels of a batch."""
    loss: Tensor = model(**batch).loss
    return loss


def divergence_from(teacher: PreTrainedModel) -> Goal:
    """Return a goal: KL(teacher || model) of every prediction, in nats.

    The labels say only which positions count.

    Raises:
        ModelError: when the goal is called, if the two models predict different choices.

    Example:
        >>> import copy
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> goal = divergence_from(copy.deepcopy(model))
        >>> float(goal(model, {"input_ids": ids, "labels": ids}).detach())
        0.0
    """

    def goal(model: PreTrainedModel, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = run(teacher, batch).logits
        found = run(model, batch).logits
        if wanted.shape != found.shape:
            raise ModelError(
                f"the teacher predicts logits of {tuple(wanted.shape)} and the model of "
                f"{tuple(found.shape)}; give the dense model that was compressed"
            )
        return logit_loss(found, wanted, _counted(model, batch["labels"], found), temperature=1.0)

    return goal


def _counted(model: PreTrainedModel, labels: Tensor, logits: Tensor) -> Tensor | None:
    """Return which positions are predictions that count; None for all."""
    if logits.dim() != 3:
        return None
    if not model.can_generate() or model.config.is_encoder_decoder:
        return labels != IGNORED
    last = torch.zeros_like(labels[:, :1], dtype=torch.bool)
    return torch.cat([labels[:, 1:] != IGNORED, last], 1)


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Raise a `TnlmError` unless the teacher is another model with the same choices, or None."""
    if teacher is None:
        return
    if not isinstance(teacher, PreTrainedModel):
        raise OptionError(
            f"teacher= is a {type(teacher).__name__}; give the dense model", argument="teacher"
        )
    if model is teacher:
        raise OptionError(
            "the model is its own teacher; copy it before it is compressed", argument="teacher"
        )
    own, its = vocabulary_of(model), vocabulary_of(teacher)
    if own != its:
        raise ModelError(
            f"the teacher has a vocabulary of {its} and the model one of {own}; give the dense "
            "model that was compressed"
        )


def hold_out(
    model: PreTrainedModel, batches: Sequence[Batch]
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Split batches into those to train on and those to measure on; a single one is both.

    Only batches with predictions are held out, one in `HELD_OUT`.
    """
    useful = [i for i, batch in enumerate(batches) if count_predictions(model, batch["labels"])]
    if len(useful) < 2:
        return batches, batches
    held = useful[::HELD_OUT]
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in held]
