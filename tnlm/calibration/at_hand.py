"""Samples from data in memory, from a loader, or from a dataset that is read by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tnlm.calibration.inputs import main_input, token_ids
from tnlm.calibration.sequences import ALLOWED, Batch, samples_of
from tnlm.calibration.windows import id_windows
from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_T = TypeVar("_T")


def drawn(items: Sequence[_T], count: int, seed: int) -> list[_T]:
    """Draw at most ``count`` items without replacement, in their original order.

    Example:
        >>> drawn("abcdef", 3, seed=0)
        ['c', 'd', 'f']
    """
    if len(items) <= count:
        return list(items)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[i] for i in chosen.tolist()]


def samples_at_hand(
    data: Any, count: int, max_length: int, seed: int, model: PreTrainedModel | None
) -> list[Batch]:
    """Return sequences from ids, images, clips, batches of them, a loader or a dataset.

    From a DataLoader, the first ``count`` are read; from a dataset, a random sample of rows.

    Raises:
        CalibrationError: if the data is of another kind.
    """
    if isinstance(data, Mapping):
        return samples_of(data, max_length, model)
    if isinstance(data, DataLoader):
        return _first(data, count, max_length, model)
    if hasattr(data, "column_names"):
        indices = drawn(range(len(data)), count, seed)
        return [sample for i in indices for sample in samples_of(data[i], max_length, model)]
    if isinstance(data, list | tuple) and not all(isinstance(i, int | np.integer) for i in data):
        return [sample for item in data for sample in samples_of(item, max_length, model)]
    if not isinstance(data, list | tuple | np.ndarray | Tensor):
        raise CalibrationError(f"calibration is a {type(data).__name__}, but must be {ALLOWED}")
    if main_input(model) == "input_ids" and np.ndim(data) == 1:
        return id_windows(token_ids(data), max_length)
    return samples_of(data, max_length, model)


def _first(
    loader: DataLoader[Any], count: int, max_length: int, model: PreTrainedModel | None
) -> list[Batch]:
    """Return the first sequences of a DataLoader, without reading further."""
    samples: list[Batch] = []
    for item in loader:
        samples += samples_of(item, max_length, model)
        if len(samples) >= count:
            break
    return samples[:count]
