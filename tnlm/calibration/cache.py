"""Folders of tensors shared by processes: written elsewhere, renamed when complete, verified."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnlm.checkpoint.exchange import check_place
from tnlm.checkpoint.json_file import read_object
from tnlm.checkpoint.raw import places, write
from tnlm.checkpoint.raw import read as raw_read
from tnlm.errors import CheckpointError
from tnlm.utils.claim import Claim
from tnlm.utils.files import write_file

logger = logging.getLogger("tnlm")

INDEX, PARTIAL = "index.json", "partial.json"


class Folder:
    """One cache entry: a file for each group of tensors, and an index with their digests.

    It is filled under a temporary name, and renamed when complete; then it is never written again.
    A temporary folder left by a killed process is removed by the next process that fills one beside
    it.

    Args:
        place: path of the complete entry.

    Example:
        >>> import tempfile, torch
        >>> place = Path(tempfile.mkdtemp()) / "entry"
        >>> folder = Folder(place)
        >>> folder.put("a", {"moment": torch.ones(2)})
        >>> folder.finish({"tokens": 3})
        >>> found, about = read(place)
        >>> found.tensor("a", "moment"), about
        (tensor([1., 1.]), {'tokens': 3})
    """

    def __init__(self, place: Path, *, partial: bool = False) -> None:
        """Start empty, without creating anything on disk."""
        self.place = place
        self._partial = place.with_name(f"{place.name}.partial") if partial else None
        self._folder = self._partial or place
        self._claim: Claim | None = None
        self._digests: dict[str, str] = {}

    def put(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a group of tensors.

        Raises:
            CheckpointError: if the cache is full or cannot be written.
        """
        try:
            self._open()
            path = self._file(group)
            write(path, tensors, tensors.items())
            self._digests[group] = _digest(path)
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from error

    def tensor(self, group: str, name: str) -> Tensor | None:
        """Return a copy of a tensor, or None if the group does not have it.

        Raises:
            CheckpointError: if the file has changed since it was written.
        """
        try:
            path = self._file(group)
            if _digest(path) == self._digests[group]:
                place = places([path]).get(name)
                return None if place is None else raw_read(place)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the cache {self._folder} cannot be read: {error}") from error
        raise CheckpointError(
            f"{path} has changed since it was written; remove {self._folder}, and run again"
        )

    def names(self, group: str) -> list[str]:
        """Return the names of a group's tensors."""
        with safe_open(self._file(group), framework="pt") as file:
            return list(file.keys())

    def mark(self, about: Mapping[str, Any]) -> None:
        """Note what a partial folder holds so far, for the next process if this one is killed."""
        if self._partial is not None:
            text = json.dumps({**about, "digests": self._digests})
            write_file(self._partial / PARTIAL, text)

    def begun(self) -> dict[str, Any] | None:
        """Take over what a killed process has noted, and return it; None if there is nothing."""
        if self._partial is None or not (self._partial / PARTIAL).exists():
            return None
        about = read_object(self._partial / PARTIAL)
        self._digests = about.pop("digests")
        return about

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the index, and rename the folder to its place unless another process was first.

        Raises:
            CheckpointError: if the cache is full or cannot be written.
        """
        index = {**about, "digests": self._digests}
        try:
            self._open()
            (self._folder / PARTIAL).unlink(missing_ok=True)
            text = json.dumps({**index, "digest": _digest_of(index)}, indent=1)
            (self._folder / INDEX).write_text(text, encoding="utf-8")
            self._take_place()
        except OSError as error:
            raise self._failed(error) from error

    def _take_place(self) -> None:
        try:
            self._folder.rename(self.place)
        except OSError:
            if not self.place.exists():
                raise
            if _problem(self.place) is None:
                return  # completed by another process; this one continues with its own
            broken = self._folder.with_name(f"{self._folder.name}-broken")
            self.place.rename(broken)
            self._folder.rename(self.place)
            shutil.rmtree(broken, ignore_errors=True)
        self._folder = self.place
        if self._claim is not None:
            self._claim.lock.close()

    def _open(self) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if self._partial is not None:
            self._partial.mkdir(exist_ok=True)
        elif self._claim is None:
            self._claim = Claim(self.place.parent)
            self._folder = self._claim.folder

    def _file(self, group: str) -> Path:
        return self._folder / f"{group}.safetensors"

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the cache {self.place.parent} cannot be written: {error}; make room, or give another "
            "cache_dir= or none"
        )


def read(place: Path) -> tuple[Folder, dict[str, Any]] | None:
    """Return a complete, unchanged folder and its index, or None.

    If a folder exists but is invalid, a warning names it.
    """
    problem = _problem(place)
    if problem == "":
        return None
    if problem is not None:
        logger.warning("%s is ignored, and made again: %s", place, problem)
        return None
    about = json.loads((place / INDEX).read_text(encoding="utf-8"))
    found = Folder(place)
    found._digests = about.pop("digests")
    about.pop("digest")
    return found, about


def check_cache(directory: str | Path) -> None:
    """Raise `CheckpointError` unless a directory can be used as a cache.

    Example:
        >>> check_cache("a-new-directory")
    """
    if not isinstance(directory, str | Path) or "\0" in str(directory) or directory == "":
        raise CheckpointError(
            f"cache_dir={directory!r}; allowed: the path of a directory", argument="cache_dir"
        )
    path = Path(directory)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"cache_dir={str(directory)!r} is a broken link", argument="cache_dir"
        )
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"cache_dir={str(directory)!r} is a file; name a directory", argument="cache_dir"
        )
    check_place(path)


def _problem(place: Path) -> str | None:
    """Return what is wrong with a folder: "" if it is missing, None if nothing."""
    try:
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        given = index.pop("digest")
        if given != _digest_of(index):
            return "its index has changed since it was written"
        for group, digest in index["digests"].items():
            if _digest(place / f"{group}.safetensors") != digest:
                return f"{group}.safetensors has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if place.exists() else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error!r}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()


def _digest_of(index: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(index, sort_keys=True).encode()).hexdigest()
