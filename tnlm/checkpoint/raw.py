"""Reads and writes tensors of safetensors files one by one, without mapping the files.

A mapped file counts as this process's memory for as long as any of its tensors lives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnlm.checkpoint.folder import read_headers
from tnlm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of tensors, by their names in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor is: a file and the offset of its first byte there."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def places(files: Sequence[Path], listed: Mapping[str, str] | None = None) -> dict[str, Place]:
    """Return where every tensor of a checkpoint is.

    Args:
        files: its safetensors files.
        listed: the file name of every tensor, if there is an index.

    Raises:
        CheckpointError: if a file is damaged or truncated, does not match the index, or has a
            tensor of a dtype that cannot be read.
    """
    headers = read_headers(files, listed)  # checks that the files are whole
    found: dict[str, Place] = {}
    for file in files:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(size))
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{name} is stored as {about['dtype']}; allowed: {', '.join(DTYPES)}"
                )
            start, kind = 8 + size + about["data_offsets"][0], DTYPES[about["dtype"]]
            found[name] = Place(file, start, kind, headers[name].shape)
    return found


@torch.inference_mode(False)  # the tensor may enter graphs later
def read(place: Place) -> Tensor:
    """Return a copy of a tensor.

    Raises:
        CheckpointError: if the file cannot be read, or ends too early.
    """
    held = torch.empty(place.nbytes, dtype=torch.uint8)
    rest = held.numpy().data
    try:
        with place.file.open("rb", buffering=0) as opened:
            opened.seek(place.offset)
            while rest:
                count = opened.readinto(rest)
                if not count:
                    raise OSError("the file ends too early")
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{place.file} cannot be read: {error}") from error
    return held.view(place.dtype).reshape(place.shape)


def write(
    path: Path, like: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, int]:
    """Write a safetensors file, one tensor after another.

    Args:
        path: of the file.
        like: shapes and dtypes of all tensors, in their order; values are not looked at.
        tensors: names and values, in the same order.

    Returns:
        The size of every tensor in bytes.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
        >>> write(path, {"a": torch.ones(2)}, [("a", torch.ones(2))])
        {'a': 8}
        >>> read(places([path])["a"])
        tensor([1., 1.])
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in like.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + sizes[name]
        kind, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if flat.numel() != sizes[name]:
                raise ValueError(f"{name} changed its size")
            rest = flat.numpy().data
            while rest:
                rest = rest[file.write(rest) :]
    return sizes
