"""Converts sequences, images and clips of many kinds to batches of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tnlm.calibration.inputs import IGNORED, TARGET, columns_of, main_input
from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALLOWED = (
    "a list of strings, the path of a text, .jsonl or parquet file, a tensor or list of token ids, "
    "a DataLoader, or rows or a datasets.Dataset with a column 'input_ids', 'text' or 'messages'"
)

Batch = dict[str, Tensor]
"""Inputs of a model's forward, by name, all with the sequences as first dimension. Text has
``input_ids`` and ``attention_mask``, int64, both ``(sequences, length)``. There may be ``labels``:
one class per sequence, ``(sequences,)``, or the output of a decoder, ``(sequences, length)``."""


def samples_of(item: Any, max_length: int, model: PreTrainedModel | None = None) -> list[Batch]:
    """Return the sequences of one item, each as a batch of one.

    Padding at both ends is removed before text is truncated to ``max_length``, so that a row padded
    on the left keeps its tokens; a row without tokens is removed. A batch that cannot be split,
    since it has images beside its text or inputs that do not belong to single sequences, stays
    whole.
    """
    if isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]  # from a TensorDataset
    if not isinstance(item, Mapping):
        item = {main_input(model): item}
    columns = columns_of(item, model)
    ids = columns.get("input_ids")
    if ids is not None:
        if ids.numel() == 0:
            return []
        columns["attention_mask"] = _mask(ids, columns.get("attention_mask"))
    if not _is_by_sequence(columns, main_input(model)):
        return [columns]
    rows = [_trimmed(row, max_length, main_input(model)) for row in _rows(columns)]
    return [row for row in rows if row is not None]


def sequences_of(batch: Mapping[str, Tensor]) -> list[Batch]:
    """Return the sequences of a batch as batches of one.

    Raises:
        CalibrationError: if the batch has several sequences and cannot be split.

    Example:
        >>> sequences_of({"input_ids": torch.tensor([[3, 4], [5, 6]])})
        [{'input_ids': tensor([[3, 4]])}, {'input_ids': tensor([[5, 6]])}]
    """
    main = "input_ids" if "input_ids" in batch else next(iter(batch))
    if len(batch[main]) == 1:
        return [dict(batch)]
    if not _is_by_sequence(batch, main):
        raise CalibrationError(
            "the data has images or sound beside text, several sequences in one batch, which this "
            "metric cannot look at one by one; give each its own batch, or use metric='two-sided'",
            argument="metric",
        )
    return list(_rows(batch))


def collated(samples: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Join sequences of text into batches, padded on the right; all others stay separate.

    Example:
        >>> ids = torch.tensor([[3, 4]])
        >>> [batch["input_ids"].shape for batch in collated([{"input_ids": ids}] * 3, 2)]
        [torch.Size([2, 2]), torch.Size([1, 2])]
    """
    batches: list[Batch] = []
    waiting: list[Batch] = []
    for sample in samples:
        if not _joins(sample):
            batches += [*_stacked(waiting), sample]
            waiting = []
        elif len(waiting) + 1 < batch_size:
            waiting.append(sample)
        else:
            batches += _stacked([*waiting, sample])
            waiting = []
    return batches + _stacked(waiting)


def _stacked(samples: Sequence[Batch]) -> list[Batch]:
    """Return sequences of text as one batch with their common columns; no batch for none."""
    if len(samples) < 2:
        return list(samples)

    def joined(name: str) -> Tensor:
        parts = [sample[name] for sample in samples]
        if parts[0].dim() == 1:
            return torch.cat(parts)
        return pad_sequence([part[0] for part in parts], batch_first=True)

    shared = (name for name in samples[0] if all(name in sample for sample in samples))
    return [{name: joined(name) for name in shared}]


def _joins(sample: Batch) -> bool:
    ids = sample.get("input_ids")
    if ids is None or any(name in sample and sample[name].dim() > 1 for name in TARGET):
        return False
    return len(ids) == 1 and all(_aligned(t, ids) or t.dim() == 1 for t in sample.values())


def _mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    kept = torch.ones_like(ids) if mask is None else (mask != 0).long()
    if ids.ndim != 2 or kept.shape != ids.shape:
        raise CalibrationError(
            f"token ids of shape {tuple(ids.shape)} with a mask of shape {tuple(kept.shape)}; "
            "both must be (length,) or (sequences, length)"
        )
    return kept


def _is_by_sequence(columns: Mapping[str, Tensor], main: str) -> bool:
    """Return whether every column has one row per sequence."""
    ids = columns.get("input_ids")
    if any(tensor.dim() == 0 or len(tensor) != len(columns[main]) for tensor in columns.values()):
        return False
    return ids is None or all(
        _aligned(tensor, ids) or name in TARGET or tensor.dim() == 1
        for name, tensor in columns.items()
    )


def _aligned(tensor: Tensor, ids: Tensor) -> bool:
    return tensor.shape[:2] == ids.shape[:2]


def _rows(columns: Mapping[str, Tensor]) -> list[Batch]:
    count = len(next(iter(columns.values())))
    return [{name: t[row : row + 1] for name, t in columns.items()} for row in range(count)]


def _trimmed(row: Batch, max_length: int, main: str) -> Batch | None:
    """Remove the padding of one sequence and truncate its text; None if nothing is left."""
    first, mask = row[main], row.get("attention_mask")
    text = "input_ids" in row
    if mask is not None and mask.dim() == 2 and mask.shape == first.shape[:2]:
        at = mask[0].nonzero().flatten().tolist()
        if not at:
            return None
        stop = min(at[-1] + 1, at[0] + max_length) if text else at[-1] + 1
        row = {
            name: t[:, at[0] : stop] if name not in TARGET and _aligned(t, mask) else t
            for name, t in row.items()
        }
    return _cut_targets(row, max_length)


def _cut_targets(row: Batch, max_length: int) -> Batch:
    """Remove the padding at the end of a decoder's input and labels, and truncate these."""
    sides = {name: row[name] for name in TARGET if name in row and row[name].dim() == 2}
    if not sides:
        return row
    mask = sides.get("decoder_attention_mask")
    if mask is None and "labels" in sides:
        mask = sides["labels"] != IGNORED
    kept = max_length
    if mask is not None:
        at = mask[0].nonzero().flatten().tolist()
        kept = min(max_length, at[-1] + 1 if at else 1)
    return row | {name: tensor[:, :kept] for name, tensor in sides.items()}
