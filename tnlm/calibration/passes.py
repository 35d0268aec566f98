"""Runs one batch through a model, with the right inputs, dtypes and decoder inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.inputs import IGNORED, decodes
from tnlm.errors import CalibrationError


def run(model: PreTrainedModel, batch: Mapping[str, Tensor], body: nn.Module | None = None) -> Any:
    """Run a batch through a model, or through its body, and return the output."""
    body = model if body is None else body
    inputs = on_device(model, {k: v for k, v in batch.items() if k != "labels"})
    if decodes(model) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_ids(model, batch).to(model.device)
    accepted = inspect.signature(body.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        inputs = {name: value for name, value in inputs.items() if name in accepted}
    return body(**inputs, **({"use_cache": False} if "use_cache" in accepted else {}))


def on_device(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch on the model's device, with images and audio in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def _decoder_ids(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a decoder's input: the labels shifted by one, or else the encoder's input.

    Raises:
        CalibrationError: if there is neither.
    """
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2:
        return _shifted(model, labels)
    if "input_ids" in batch:
        return batch["input_ids"]
    raise CalibrationError(
        f"the decoder of a {type(model).__name__} reads tokens of its own, but the data has "
        f"{', '.join(batch)} only; add labels or decoder_input_ids"
    )


def _shifted(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the decoder's input tokens for these labels."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        ids: Tensor = own(labels=labels)
        return ids
    known = (model.config, model.config.get_text_config(decoder=True))
    starts = (getattr(config, "decoder_start_token_id", None) for config in known)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise CalibrationError(
            f"the config of a {type(model).__name__} has no decoder_start_token_id, and labels "
            "cannot be moved on; set it, or give decoder_input_ids"
        )
    pad = getattr(model.config, "pad_token_id", None) or 0
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], 1)
