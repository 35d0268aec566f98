"""Writes a compressed model piece by piece: a file for every block as soon as it is fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.entries import Entry, build
from tnlm.checkpoint.json_file import read_object
from tnlm.checkpoint.raw import write
from tnlm.checkpoint.skeleton import placeholder
from tnlm.compression.fitting import Fitting, by_module
from tnlm.compression.install import install, replace_norm
from tnlm.compression.job import Job
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.swap import Shelf, Swap
from tnlm.streaming.blocks import tensors_of
from tnlm.utils.files import write_file
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
        own: the blocks that this process writes; None for all.

    Attributes:
        left: names of the blocks that are not written yet.
        files: the sizes of the tensors in every file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[str],
        job: Job,
        fitting: Fitting,
        shelf: Shelf,
        folder: Path,
        own: Collection[str] | None = None,
    ) -> None:
        """Start with nothing written."""
        self._model, self._blocks, self._fitting, self._shelf = model, blocks, fitting, shelf
        self._targets = job.selection.targets
        self._swap = _Replace(model)
        self.folder = folder
        self._described: dict[str, Described] = {}
        self.left = list(blocks)
        self._own = frozenset(blocks if own is None else own)
        self.files: dict[Path, dict[str, int]] = {}

    def restore(self) -> None:
        """Take over the blocks that an earlier run has finished."""
        for block in list(self.left):
            about = self._finished(block)
            if about is not None:
                self.left.remove(block)
                self._put_back(block, about)

    def take(self) -> None:
        """Write every block of which all targets are fitted."""
        for block in [each for each in self.left if each in self._own]:
            if not self._fitting.awaits(f"{block}."):
                self.left.remove(block)
                before = {*self._described}
                self._install(f"{block}.")
                self._write(block)
                self._finish(block, {*self._described} - before)
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

    def _finish(self, block: str, modules: set[str]) -> None:
        """Say beside a block's file that it is whole, and what was fitted."""
        path, fitting = self._path(block), self._fitting
        start = f"{block}."
        about = {
            "digest": _digest(path),
            "sizes": self.files[path],
            "modules": {name: self._described[name] for name in sorted(modules)},
            "entries": {n: entry for n, entry in fitting.entries.items() if n.startswith(start)},
            "errors": fitting.errors,
            "ties": fitting.ties,
        }
        write_file(path.with_suffix(".json"), json.dumps(about))

    def _finished(self, block: str) -> dict[str, Any] | None:
        """Return what stands beside a block's file, if the file is whole."""
        path = self._path(block)
        if not path.exists() or not path.with_suffix(".json").exists():
            return None
        about = read_object(path.with_suffix(".json"))
        return about if _digest(path) == about["digest"] else None

    def _put_back(self, block: str, about: Mapping[str, Any]) -> None:
        """Let a block stand as it was when it was written, without values."""
        self.files[self._path(block)] = about["sizes"]
        self._fitting.restore(about["entries"], about["errors"], about["ties"])
        for module, (entries, tied) in about["modules"].items():
            self._described[module] = entries, tied
            for name, entry in entries.items():
                old = self._model.get_submodule(name)
                like = next(old.parameters())
                made = build(entry, device=like.device, dtype=like.dtype, old=old)
                self._swap.replace(name, made.train(old.training))
        self._blank(block)

    def _path(self, block: str | None) -> Path:
        number = len(self._blocks) if block is None else self._blocks.index(block)
        return self.folder / f"part-{number:05d}.safetensors"

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
        norms = self._fitting.norms
        for name in [name for name in norms if name.startswith(within)]:
            replace_norm(self._model, self._swap, name, norms.pop(name))

    def _write(self, block: str | None) -> None:
        """Write the tensors of a block, or of all outside the blocks."""
        shared = {*self._fitting.ties}.union(*(tied for _, tied in self._described.values()))
        names = [n for n in tensors_of(self._model, block, self._blocks) if n not in shared]
        like = {name: self._model.get_parameter_or_buffer(name) for name in names}
        path = self._path(block)
        try:
            self.files[path] = write(path, like, self._values(names))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot hold the compressed model: {error}; make room, or give "
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; looked at in parts, as the test makes copies."""
    flat = tensor.detach().flatten()
    return all(bool(torch.isfinite(part).all()) for part in flat.split(CHUNK))
