"""How far a walk has come, kept on disk so that a killed run can go on from there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tnlm.calibration.states import States
from tnlm.checkpoint.raw import places, read, write
from tnlm.errors import CheckpointError
from tnlm.parallel.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import nn


class Trail:
    """Files with the states of all batches at some places of a walk.

    Args:
        folder: where they are; None to keep nothing.
        workers: processes that each keep the states of their batches in a folder of their own.

    Example:
        >>> import tempfile, torch
        >>> trail, model = Trail(Path(tempfile.mkdtemp())), torch.nn.Linear(1, 1)
        >>> _ = trail.keep("3", States(model, [torch.ones(2)]))
        >>> trail.latest(["2", "3", "4"]), list(trail.states(model, "3"))
        ('3', [tensor([1., 1.])])
    """

    def __init__(self, folder: Path | None, workers: Workers = ALONE) -> None:
        """Start at a folder."""
        self._folder, self._workers = folder, workers

    def within(self, name: str) -> Trail:
        """Return the trail of one of several walks."""
        folder = None if self._folder is None else self._folder / name
        return Trail(folder, self._workers)

    def latest(self, names: Sequence[str]) -> str | None:
        """Return the last of some names under which all processes have states, or None."""
        if self._folder is None:
            return None
        found = self._workers.gather([name for name in names if self._file(name).exists()])
        common = set(names).intersection(*found)
        return next((name for name in reversed(names) if name in common), None)

    def keep(self, name: str, states: States) -> bool:
        """Keep the states under a name, and return whether they are kept.

        Raises:
            CheckpointError: if the disk is full.
        """
        if self._folder is None:
            return False
        path, like = self._file(name), dict(_numbered(states.like()))
        new = path.with_suffix(".new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(new, like, _numbered(states))
            new.replace(path)
            return True
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be written: {error}") from error

    def states(self, model: nn.Module, name: str) -> States:
        """Return the states under a name, on the model's device."""
        found, device = places([self._file(name)]), next(model.parameters()).device
        kept = (read(found[f"{index:06d}"]).to(device) for index in range(len(found)))
        return States(model, kept)

    def clear(self) -> None:
        """Remove everything."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def drop(self, name: str) -> None:
        """Remove the states under a name, if there are any."""
        if self._folder is not None:
            self._workers.gather(None)  # until all have kept what replaces them
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        if self._folder is None:
            raise LookupError("nothing is kept")
        return self._folder / f"{name}.safetensors"


def _numbered(states: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{index:06d}", state) for index, state in enumerate(states))
