"""What adapters are trained for: the data's labels, or the predictions of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.inputs import IGNORED
from tnlm.errors import ModelError, OptionError
from tnlm.recovery.lessons import logit_loss

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
        >>> float(goal(model, {"input_ids": ids, "labels": ids}))
        0.0
    """

    def goal(model: PreTrainedModel, batch: Batch) -> Tensor:
        shown = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            wanted = teacher(**{k: v.to(teacher.device) for k, v in shown.items()}).logits
        found = model(**shown).logits
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
    """Raise `OptionError` if a model is its own teacher."""
    if model is teacher:
        raise OptionError(
            "the model is its own teacher; copy it before it is compressed", argument="teacher"
        )


def hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Split batches into those to train on and those to measure on; a single one is both.

    Example:
        >>> [len(part) for part in hold_out([{}] * 40)], [len(part) for part in hold_out([{}])]
        ([37, 3], [1, 1])
    """
    if len(batches) < 2:
        return list(batches), list(batches)
    held = list(batches[::HELD_OUT])
    return [batch for i, batch in enumerate(batches) if i % HELD_OUT], held
