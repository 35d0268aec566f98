"""Writes a compressed model piece by piece: a file for every block as soon as it is fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.entries import Entry
from tnlm.checkpoint.raw import write
from tnlm.checkpoint.skeleton import placeholder
from tnlm.compression.fitting import Fitting, by_module
from tnlm.compression.install import install
from tnlm.compression.job import Job
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.swap import Shelf, Swap
from tnlm.streaming.blocks import tensors_of
from tnlm.utils.memory import release
from tnlm.utils.residency import resident

CHUNK = 2**22
"""Values that are tested at once."""
Described = tuple[dict[str, Entry], dict[str, str]]
"""What a checkpoint says of a module: entries, and tied parameters."""


class _Replace(Swap):
    """Replaces modules for good: their weights are on disk, and are never put back."""

    def spill(self, name: str) -> None:
        """Keep nothing."""


class Pieces:
    """Takes the fitted modules of a block, and writes and frees the block.

    Args:
        model: a skeleton; its blocks are replaced, and their weights freed.
        blocks: names of its blocks.
        job: the request.
        fitting: holds what was fitted.
        shelf: holds the fitted modules.
        folder: where the files are written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[str],
        job: Job,
        fitting: Fitting,
        shelf: Shelf,
        folder: Path,
    ) -> None:
        """Start with nothing written."""
        self._model, self._blocks, self._fitting, self._shelf = model, blocks, fitting, shelf
        self._targets = job.selection.targets
        self._swap = _Replace(model)
        self._folder = folder
        self._described: dict[str, Described] = {}
        self._left = list(blocks)
        self.files: dict[Path, dict[str, int]] = {}

    def take(self) -> None:
        """Write every block of which all targets are fitted."""
        for block in list(self._left):
            if not self._fitting.awaits(f"{block}."):
                self._left.remove(block)
                self._install(f"{block}.")
                self._write(block)
                self._blank(block)
                release()

    def finish(self) -> TnlmConfig:
        """Write what is outside the blocks, and return the description of the model."""
        self.take()
        self._install("")
        self._write(None)
        made = TnlmConfig()
        for group in by_module(self._targets):
            entries, tied = self._described.get(group[0].module, ({}, {}))
            made.modules.update(entries)
            made.tied.update(tied)
        made.tied.update(self._fitting.ties)
        return made

    def _install(self, within: str) -> None:
        """Put fitted modules into the model whose names begin so."""
        self._fitting.fit_beside(within)
        entries = self._fitting.entries
        for group in by_module(self._targets):
            module = group[0].module
            wanted = module.startswith(within) and module not in self._described
            if wanted and group[0].name in entries:
                made = install(self._model, self._swap, group, entries, self._shelf)
                self._described[module] = made

    def _write(self, block: str | None) -> None:
        """Write the tensors of a block, or of all outside the blocks."""
        shared = {*self._fitting.ties}.union(*(tied for _, tied in self._described.values()))
        names = [n for n in tensors_of(self._model, block, self._blocks) if n not in shared]
        like = {name: self._model.get_parameter_or_buffer(name) for name in names}
        number = len(self._blocks) if block is None else self._blocks.index(block)
        path = self._folder / f"part-{number:05d}.safetensors"
        try:
            self.files[path] = write(path, like, self._values(names))
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot hold the compressed model: {error}; make room, or give "
                "another scratch=",
                argument="scratch",
            ) from error

    def _values(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            with resident(self._model, name.rpartition(".")[0], recurse=False):
                tensor = self._model.get_parameter_or_buffer(name)
                if not _is_finite(tensor):
                    raise ModelError(f"{name} has values that are not finite")
                yield name, tensor

    def _blank(self, block: str) -> None:
        """Free the factors of a block; the files hold them."""
        for parameter in self._model.get_submodule(block).parameters():
            held: Any = placeholder(parameter)
            parameter.data = held


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; looked at in parts, as the test makes copies."""
    flat = tensor.detach().flatten()
    return all(bool(torch.isfinite(part).all()) for part in flat.split(CHUNK))
