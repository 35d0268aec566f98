"""Columns of data beside the token ids: those that a model takes, and that would be lost."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARRIED = ("input_ids", "attention_mask", "labels")
"""What a batch carries."""
MEDIA = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "audio_values",
    "bbox",
)
"""Inputs of models of more than text, which may not do without them."""
NEVER_TEXT = (*MEDIA, "inputs_embeds", "encoder_outputs")
"""What is no text, whichever model it is for."""
_SWITCHES = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")


def takes(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the inputs that a model's forward takes.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> "input_ids" in takes(tiny), "pixel_values" in takes(tiny)
        (True, False)
    """
    return frozenset(inspect.signature(model.forward).parameters)


def check_columns(item: Mapping[str, Any], model: PreTrainedModel | None) -> None:
    """Raise `CalibrationError` for an input that the model takes, and that no batch carries.

    What says no more than the model assumes without it may be there: types of tokens that are all
    0, and positions that count from 0.

    Args:
        item: one sequence or batch, by column.
        model: that it is for; without one, what is never text is refused.

    Example:
        >>> check_columns({"input_ids": [[1]], "pixel_values": [[0.5]]}, None)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: the data has 'pixel_values', which would be lost: ...
    """
    known = frozenset(NEVER_TEXT) if model is None else takes(model) - set(_SWITCHES)
    for name in item:
        if name in CARRIED or name not in known or item[name] is None:
            continue
        if name == "token_type_ids" and not bool(torch.as_tensor(item[name]).any()):
            continue
        if name == "position_ids" and _counts(torch.as_tensor(item[name])):
            continue
        raise CalibrationError(
            f"the data has {name!r}, which would be lost: statistics are taken of token ids alone; "
            "leave the column out if they are to be those of text alone"
        )


def _counts(positions: torch.Tensor) -> bool:
    return bool((positions == torch.arange(positions.shape[-1])).all())
