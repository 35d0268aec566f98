"""Converts data to the tensors that a model's forward accepts, and checks its main input."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
"""The label of positions that are not predicted."""
TEXT = ("input_ids", "attention_mask", "labels")
"""The columns of a batch of text, and the only ones used for training."""
TARGET = ("labels", "decoder_input_ids", "decoder_attention_mask")
"""The columns of a decoder's inputs and labels, beside the encoder's input."""
MEDIA = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "audio_values",
    "bbox",
)
"""Inputs of multimodal models."""
NEVER_TEXT = (*MEDIA, "inputs_embeds", "encoder_outputs")
"""Inputs that are never text, for any model."""
_REMEDY = (
    "; give batches as the model's processor makes them, or use a scheme and a metric that look at "
    "no data, such as svd"
)
_SWITCHES = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
_DIMENSIONS = {
    "input_ids": 2,
    "attention_mask": 2,
    "decoder_input_ids": 2,
    "decoder_attention_mask": 2,
    "pixel_values": 4,
    "input_values": 2,
    "input_features": 3,
}
"""Dimensions of a batched input; with one fewer, it is a single example."""


def takes(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the inputs that a model's forward accepts.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> "input_ids" in takes(tiny), "pixel_values" in takes(tiny)
        (True, False)
    """
    return frozenset(inspect.signature(model.forward).parameters)


def main_input(model: PreTrainedModel | None) -> str:
    """Return the name of a model's main input, which is required.

    Example:
        >>> main_input(None)
        'input_ids'
    """
    return str(getattr(model, "main_input_name", None) or "input_ids")


def check_main(names: Iterable[str], model: PreTrainedModel | None) -> None:
    """Raise `CalibrationError` unless the main input is among the names.

    Example:
        >>> check_main(["tokens"], None)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: a batch has the keys ['tokens']; it needs 'input_ids'
    """
    names, wanted = list(names), main_input(model)
    if wanted in names:
        return
    who = "it" if model is None else f"a {type(model).__name__}"
    remedy = "" if wanted == "input_ids" else _REMEDY
    raise CalibrationError(f"a batch has the keys {names}; {who} needs {wanted!r}{remedy}")


def reads_targets(model: PreTrainedModel | None) -> bool:
    """Return whether labels are separate sequences, as for decoders and aligned audio."""
    if model is None or type(model).__name__.endswith("Classification"):
        return False
    return decodes(model) or type(model).__name__.endswith("ForCTC")


def decodes(model: PreTrainedModel) -> bool:
    """Return whether the model has an encoder and a decoder of token ids."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in takes(model)


def columns_of(item: Mapping[str, Any], model: PreTrainedModel | None) -> dict[str, Tensor]:
    """Return the columns of a sequence or batch that a model accepts, as batched tensors.

    Columns that its forward does not accept, such as indices, are ignored, and so are values that
    the model assumes by default: token types that are all 0, and positions that count from 0.
    Labels are kept if they are classes, or separate sequences.

    Args:
        item: one sequence or batch, by column.
        model: the model to run; without one, only token ids, their mask and classes are accepted.

    Raises:
        CalibrationError: if the main input is missing, a column is not a tensor, or there are
            images, audio or embeddings that the model does not accept.

    Example:
        >>> columns_of({"input_ids": [1, 2], "idx": 3}, None)
        {'input_ids': tensor([[1, 2]])}
        >>> columns_of({"input_ids": [[1]], "pixel_values": [[0.5]]}, None)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: the data has 'pixel_values', which would be lost: ...
    """
    check_main(item, model)
    known = frozenset(TEXT) if model is None else (takes(model) | {"labels"}) - set(_SWITCHES)
    found = {}
    for name, value in item.items():
        if value is None:
            continue
        if name in known:
            tensor = token_ids(value) if name.endswith("input_ids") else _tensor(name, value)
            if not _says_nothing(name, tensor):
                found[name] = tensor
        elif name in NEVER_TEXT:
            who = (
                "only text is accepted here" if model is None else f"not a {type(model).__name__}'s"
            )
            raise CalibrationError(
                f"the data has {name!r}, which would be lost: {who}; leave the column out"
            )
    return _with_labels(_batched(found, main_input(model)), model)


def token_ids(value: Any) -> Tensor:
    """Return token ids as an int64 tensor on the CPU.

    Example:
        >>> token_ids([3, 4])
        tensor([3, 4])
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as err:
        raise CalibrationError(
            f"calibration has a {type(value).__name__} that is not token ids ({err}); give texts, "
            "a file of them, ids, or batches of a DataLoader or a datasets.Dataset"
        ) from err
    if ids.is_meta or ids.is_nested or ids.layout != torch.strided:
        raise CalibrationError("token ids must be a dense tensor with data; this one is not")
    if ids.numel() == 0:
        return ids.to("cpu", torch.int64)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise CalibrationError(f"token ids must be integers, got {ids.dtype}")
    ids = ids.to("cpu", torch.int64)
    if int(ids.min()) < 0:
        raise CalibrationError(f"token ids must not be negative, got {int(ids.min())}")
    return ids


def _tensor(name: str, value: Any) -> Tensor:
    """Return a column as a detached tensor on the CPU."""
    listed = isinstance(value, list | tuple)
    shapes = {tuple(np.shape(each)) for each in value} if listed and _are_arrays(value) else set()
    if len(shapes) > 1:
        raise CalibrationError(
            f"{name!r} has examples of several sizes in one batch: "
            f"{', '.join(map(str, sorted(shapes)))}; make them of one size, or give each its own "
            "batch"
        )
    try:
        tensor = torch.stack([torch.as_tensor(v) for v in value]) if shapes else None
        tensor = torch.as_tensor(value) if tensor is None else tensor
    except (TypeError, ValueError, RuntimeError) as err:
        raise CalibrationError(
            f"{name!r} is a {type(value).__name__}, not a tensor: {err}"
        ) from err
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        raise CalibrationError(f"{name!r} must be a dense tensor with data; this one is not")
    return tensor.detach().to("cpu", torch.int64 if tensor.dtype == torch.bool else tensor.dtype)


def _are_arrays(values: Any) -> bool:
    return all(isinstance(each, Tensor | np.ndarray) for each in values) and len(values) > 0


def _says_nothing(name: str, tensor: Tensor) -> bool:
    if name == "token_type_ids":
        return not bool(tensor.any())
    if name == "position_ids" and tensor.dim() > 0:
        return bool((tensor == torch.arange(tensor.shape[-1])).all())
    return False


def _batched(columns: Mapping[str, Tensor], main: str) -> dict[str, Tensor]:
    """Add the batch dimension to a single example."""
    first = columns[main]
    if first.dim() != _DIMENSIONS.get(main, 0) - 1:
        return dict(columns)

    def alone(name: str, tensor: Tensor) -> bool:
        if name in _DIMENSIONS:
            return tensor.dim() == _DIMENSIONS[name] - 1
        return name == "labels" or main != "input_ids" or tensor.shape[:1] == first.shape

    return {n: t.unsqueeze(0) if alone(n, t) else t for n, t in columns.items()}


def _with_labels(columns: dict[str, Tensor], model: PreTrainedModel | None) -> dict[str, Tensor]:
    """Keep labels only if they are classes, or separate sequences."""
    labels = columns.pop("labels", None)
    count = len(columns[main_input(model)])
    if labels is None or labels.is_floating_point():
        return columns
    if reads_targets(model):
        return columns | ({"labels": labels.long()} if labels.dim() == 2 else {})
    if labels.numel() != count or labels.dim() > 1 + (count == 1):
        return columns
    return columns | {"labels": labels.long().flatten()}
