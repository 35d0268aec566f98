"""A module of the model's own class some of whose tensors lost rows: experts, and their router."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tnlm.checkpoint.kinds.base import Entry, EntryKind, Place
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.rows import COUNTS, set_counts, with_rows

if TYPE_CHECKING:  # whose import imports the plug-in, and that this file
    from transformers import PreTrainedModel


class Rows(EntryKind):
    """Which of ``rows`` are ``kept``, and the names of the ``tensors`` that lost the others."""

    name = "rows"

    def check(self, entry: Entry, module: nn.Module) -> None:
        """Compare the rows with those of the module's tensors."""
        rows, kept = entry["rows"], entry["kept"]
        plain = all(type(row) is int and 0 <= row < rows for row in kept)
        if not kept or not plain or sorted(set(kept)) != kept:
            raise CheckpointError(f"kept={kept!r}; allowed: some of {rows} rows, in their order")
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        for name in entry["tensors"]:
            if shapes[name][0] != rows:
                raise CheckpointError(f"{name} has {shapes[name][0]} rows, not {rows}")

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return the model's own module with the rows that are kept, where and as it is."""
        if place.old is None:
            raise CheckpointError("rows are taken from a module; none was given")
        whole = {k: t for k, t in place.old.state_dict().items() if k in entry["tensors"]}
        if whole and all(len(tensor) == len(entry["kept"]) for tensor in whole.values()):
            return place.old  # built before
        return with_rows(place.old, entry["tensors"], entry["rows"], torch.tensor(entry["kept"]))

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return the module as it is, of the model's own class."""
        done: nn.Module = module
        return done

    def before_dense(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        """Let the config say how many experts there are, if it is the same everywhere.

        Raises:
            ModelError: if blocks keep different numbers of experts, which no config can say.
        """
        counts = {(entry["rows"], len(entry["kept"])) for entry in entries.values()}
        if len(counts) > 1:
            kept = ", ".join(sorted({f"{left} of {rows}" for rows, left in counts}))
            raise ModelError(
                f"its blocks keep different numbers of experts ({kept}), which the config of a "
                f"{type(model).__name__} cannot say, and a router cannot be kept from choosing an "
                "expert that is there. Keep the model compressed, or compress with "
                "allocation='uniform'"
            )
        (rows, left) = counts.pop()
        config = _with_count(model.config, rows, left)
        if not _fits(type(model), config, model, entries, rows, left):
            raise ModelError(
                f"the config of a {type(model).__name__} does not say how many experts each block "
                f"has, of which {left} of {rows} are left; keep the model compressed"
            )
        for own in _configs(model.config):
            _set(own, rows, left)
        set_counts(model, rows, left)


def _with_count(config: PreTrainedConfig, rows: int, left: int) -> PreTrainedConfig:
    made = copy.deepcopy(config)
    vars(made).pop("quantization_config", None)
    for own in _configs(made):
        _set(own, rows, left)
    return made


def _set(config: PreTrainedConfig, rows: int, left: int) -> None:
    for name, value in list(vars(config).items()):
        if type(value) is int and value == rows and COUNTS in name:
            setattr(config, name, left)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _fits(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    model: PreTrainedModel,
    entries: Mapping[str, Entry],
    rows: int,
    left: int,
) -> bool:
    """Return whether a config's model has modules like those that lost rows, and all others."""
    try:
        with torch.device("meta"):
            skeleton = kind(config)
        sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        same = (_shapes(skeleton, name) == _shapes(model, name) for name in entries)
        # A block that kept all its experts has more rows in its router than the config's model.
        whole = (
            name in sizes and tuple(sizes[name][:1]) == (rows,) and tuple(each.shape[:1]) == (left,)
            for name, each in skeleton.state_dict().items()
        )
        return all(same) and not any(whole)
    except Exception:  # code of others: whatever it raises, the config does not do
        return False


def _shapes(model: nn.Module, name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.get_submodule(name).state_dict().items()}


KIND = Rows()
