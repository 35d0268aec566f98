"""Sequences of token ids, with their masks and classes, of the many kinds that users give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tnlm.calibration.inputs import check_columns
from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALLOWED = (
    "a list of strings, the path of a text or .jsonl file, a tensor or list of token ids, "
    "a DataLoader, or a datasets.Dataset with a column 'input_ids' or 'text'"
)


class Row(NamedTuple):
    """One sequence: its token ids and its mask, both ``(length,)``, and its class if it has one."""

    ids: Tensor
    mask: Tensor
    label: int | None = None


def sequence_rows(item: Any, max_length: int, model: PreTrainedModel | None = None) -> list[Row]:
    """Return the sequences of one item: ids ``(length,)`` or ``(rows, length)``, maybe with a mask.

    Padding at both ends is dropped before a row is cut to ``max_length``, so that a row padded on
    the left keeps its tokens; a row without tokens is dropped.
    """
    mask, classes = None, None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise CalibrationError(f"a batch has the keys {list(item)}; it needs 'input_ids'")
        check_columns(item, model)
        classes = item.get("labels")
        item, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]  # what a TensorDataset yields
    ids = token_ids(item)
    if ids.numel() == 0:
        return []
    kept = torch.ones_like(ids) if mask is None else (torch.as_tensor(mask).cpu() != 0).long()
    if ids.ndim not in (1, 2) or kept.shape != ids.shape:
        raise CalibrationError(
            f"token ids of shape {tuple(ids.shape)} with a mask of shape {tuple(kept.shape)}; "
            "both must be (length,) or (sequences, length)"
        )
    rows = ids.reshape(-1, ids.shape[-1]), kept.reshape(-1, ids.shape[-1])
    found = []
    for row, keep, label in zip(*rows, _classes(classes, len(rows[0])), strict=True):
        at = keep.nonzero().flatten().tolist()
        if at:
            span = slice(at[0], min(at[-1] + 1, at[0] + max_length))
            found.append(Row(row[span], keep[span], label))
    return found


def _classes(labels: Any, count: int) -> Sequence[int | None]:
    """Return the class of every sequence; labels of tokens are not classes."""
    if labels is None:
        return [None] * count
    classes = torch.as_tensor(labels)
    if classes.dim() > 1 or classes.is_floating_point() or classes.numel() != count:
        return [None] * count
    return [int(label) for label in classes.flatten()]


def token_ids(value: Any) -> Tensor:
    """Return token ids as an int64 tensor on the CPU, or say why they are none."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as err:
        raise CalibrationError(
            f"calibration holds a {type(value).__name__} that is no token ids ({err}); "
            f"give {ALLOWED}"
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
