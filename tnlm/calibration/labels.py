"""Checks batches with labels, splits them into sequences, and counts their predictions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.capacity import check_batches
from tnlm.calibration.inputs import IGNORED, decodes
from tnlm.calibration.loss import labels_of
from tnlm.calibration.passes import on_device
from tnlm.calibration.sequences import Batch, sequences_of
from tnlm.errors import CalibrationError
from tnlm.targets.ends import output_head


def check_are_batches(batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `CalibrationError` for anything but batches, such as the name of a text file."""
    listed = isinstance(batches, Sequence)
    wrong = [each for each in (batches if listed else ()) if not isinstance(each, Mapping)]
    if not listed or wrong:
        what = f" of {type(wrong[0]).__name__}" if wrong else ""
        raise CalibrationError(
            f"expected batches, got a {type(batches).__name__}{what}; give a list of mappings with "
            "input_ids, attention_mask and labels, such as tnlm.recovery.examples.batches makes"
        )


def check_labels(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `CalibrationError` unless there are batches with labels, and a model with a loss."""
    if "labels" not in inspect.signature(model.forward).parameters:
        raise CalibrationError(f"a {type(model).__name__} has no loss; load it with its head")
    check_are_batches(batches)
    if not batches:
        raise CalibrationError("no batch was given")
    for number, batch in enumerate(batches):
        if batch.get("labels") is None:
            raise CalibrationError(f"batch {number} has no labels, only {', '.join(batch)}")
    check_batches(model, [batch for batch in batches if "input_ids" in batch])


def examples(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the sequences of a batch one by one, on the model's device."""
    for sequence in sequences_of(batch):
        yield on_device(model, sequence)


def count_predictions(model: PreTrainedModel, labels: Tensor) -> int:
    """Return the number of predictions over which an example's mean loss is taken."""
    if labels.dim() != 2 or labels.is_floating_point():
        return 1
    shifted = model.can_generate() and not model.config.is_encoder_decoder
    return int(((labels[:, 1:] if shifted else labels) != IGNORED).sum())


def with_labels(model: PreTrainedModel, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Add labels to batches, so that a language model predicts their own tokens.

    A classifier's batches already have labels.

    Raises:
        CalibrationError: if the model has no output head over its vocabulary.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        >>> [batch] = with_labels(model, [batch])
        >>> batch["labels"]
        tensor([[-100,    6,    7]])
    """
    if batches and all("labels" in batch for batch in batches):
        return list(batches)
    if output_head(model) is None:
        raise CalibrationError(
            f"gradients need a model with an output head over its vocabulary, but a "
            f"{type(model).__name__} has none; load it with its head, or use a metric without "
            "gradients, such as metric='input'"
        )
    found = []
    for batch in batches:
        labels, extra = labels_of(model, batch)[0], {}
        if decodes(model):
            read = batch["decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"]
            extra = {"decoder_input_ids": read}
        elif model.can_generate():  # its loss shifts the labels
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, :-1]], 1)
        found.append({**batch, **extra, "labels": labels})
    return found
