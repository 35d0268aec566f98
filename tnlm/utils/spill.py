"""Keeps tensors on disk, in an unnamed file that never outlives the process."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnlm.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a `Spill`."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.shape.numel() * self.dtype.itemsize


class Spill:
    """One temporary file for many tensors, created for the first one.

    The system frees its space with the last reference, even if the process is killed.

    Example:
        >>> spill = Spill()
        >>> slot = spill.put(torch.arange(3))
        >>> spill.take(slot)
        tensor([0, 1, 2])
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Start empty.

        Args:
            folder: where the file is created; None for the system's temporary directory.
        """
        self._file: Any = None
        self._folder = folder

    def put(self, tensor: Tensor, instead: Slot | None = None) -> Slot:
        """Write a copy of a tensor.

        Args:
            tensor: any.
            instead: a place that is not needed any more, used again if the size is the same.

        Raises:
            CheckpointError: if the temporary directory is full or cannot be written.
        """
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        rest = flat.numpy().data
        try:
            if self._file is None:  # unbuffered, so that a full disk fails here and not later
                self._file = tempfile.TemporaryFile(  # noqa: SIM115
                    prefix="tnlm-", buffering=0, dir=self._folder
                )
                weakref.finalize(self, self._file.close)
            again = instead is not None and instead.nbytes == flat.numel()
            offset = self._file.seek(instead.offset if instead and again else 0, 0 if again else 2)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            place = self._folder or _place()
            raise CheckpointError(
                f"the temporary directory {place} cannot hold {flat.numel() / 2**20:,.1f} MiB "
                f"more: {error}; the environment variable TMPDIR names another place"
            ) from error
        return Slot(offset, tensor.shape, tensor.dtype, tensor.device)

    @torch.inference_mode(False)  # the tensor may enter graphs later
    def take(self, slot: Slot) -> Tensor:
        """Return a copy of a tensor, on its original device.

        Raises:
            CheckpointError: if it cannot be read.
        """
        held = torch.empty(slot.nbytes, dtype=torch.uint8)
        rest = held.numpy().data
        try:
            self._file.seek(slot.offset)
            while rest:
                count = self._file.readinto(rest)
                if not count:
                    raise OSError("the file ends too early")
                rest = rest[count:]
        except OSError as error:
            place = self._folder or _place()
            raise CheckpointError(f"a file in {place} cannot be read: {error}") from error
        return held.view(slot.dtype).reshape(slot.shape).to(slot.device)


def _place() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none of the places that Python tries
        return "of this machine"
