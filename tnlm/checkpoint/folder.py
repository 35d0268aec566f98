"""The weight files of a checkpoint: safetensors in its directory, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tnlm.checkpoint.json_file import read_object, shortened
from tnlm.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """The header of one tensor in a file.

    Attributes:
        dtype: its name in safetensors, e.g. ``"F32"``.
        shape: shape of the tensor.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path


def file_of(folder: Path, name: object) -> Path:
    """Return the path of a checkpoint's file, which must be in its directory.

    Links must stay in the directory or, as in the hub's cache, lead to the blobs of the same
    repository.

    Raises:
        CheckpointError: if the file is missing, not an ordinary file, or outside the directory.

    Example:
        >>> file_of(Path("model"), "../secret.safetensors")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: '../secret.safetensors' is not the name of a file in model
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not plain:
        raise CheckpointError(f"{shortened(name)!r} is not the name of a file in {folder}")
    path = folder / str(name)
    try:
        there, real, homes = path.is_file(), path.resolve(), _homes(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {shortened(error)}") from error
    if not there:
        raise CheckpointError(f"{folder} has no file {name}")
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link that leads out of the directory, to {real}")
    return path


def _homes(folder: Path) -> list[Path]:
    """Return where a checkpoint's files may be: its directory, and the blobs of the hub's cache."""
    snapshots = [path for path in (folder, *folder.parents) if path.parent.name == "snapshots"]
    return [folder, *(path.parent.parent / "blobs" for path in snapshots[:1])]


def named(name: str, variant: str | None) -> str:
    """Return a weight file's name with its variant, as transformers writes it.

    Example:
        >>> named("model.safetensors.index.json", "fp16")
        'model.safetensors.index.fp16.json'
    """
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def weight_files(folder: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str]]:
    """Return the files with a checkpoint's weights, and the tensors listed in its index.

    Args:
        folder: folder of the checkpoint.
        variant: variant in the file names, e.g. ``"fp16"``.

    Raises:
        CheckpointError: if there are none, or one is elsewhere or not a safetensors file.
    """
    single, index = named(WEIGHTS, variant), named(INDEX, variant)
    if os.path.lexists(folder / single):
        return [file_of(folder, single)], {}
    if not os.path.lexists(folder / index):
        raise CheckpointError(
            f"{folder} has neither {single} nor {index}; weights in other files are not read"
        )
    listed = read_index(file_of(folder, index))
    return [file_of(folder, name) for name in sorted(set(listed.values()))], listed


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of every tensor in an index.

    Raises:
        CheckpointError: if the file is not an index, or names files other than safetensors.
    """
    index = read_object(path)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{path} is not an index: it needs 'weight_map' and 'metadata'")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts {shortened(tensor, 80)} into {shortened(name, 80)!r}; allowed: a "
                "safetensors file in the same directory"
            )
    return listed


def read_headers(
    files: Sequence[Path], listed: Mapping[str, str] | None = None
) -> dict[str, Stored]:
    """Return the header of every tensor in safetensors files.

    Args:
        files: the files of one checkpoint.
        listed: the file name of every tensor, if there is an index.

    Raises:
        CheckpointError: if a file cannot be read, two files hold a tensor of the same name, or the
            files do not match the index.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in found:
                raise CheckpointError(f"{name} is in {found[name].file.name} and in {file.name}")
            found[name] = stored
    if listed:
        wrong = {name for name, stored in found.items() if listed.get(name) != stored.file.name}
        wrong |= listed.keys() - found.keys()
        if wrong:
            raise CheckpointError(f"the index is wrong about {shortened(min(wrong), 80)}")
    return found


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: Stored(one.get_dtype(), tuple(one.get_shape()), file)
                for name, one in slices.items()
            }
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file: {shortened(error)}"
        ) from error
