"""Locates a checkpoint's files: a directory, or the local copy of a hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file, extract_commit_hash

from tnlm.checkpoint.dense_models import looks_like_path
from tnlm.checkpoint.exchange import recover
from tnlm.checkpoint.folder import INDEX, WEIGHTS, named, read_index
from tnlm.checkpoint.hub import hub_options
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.errors import CheckpointError

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def locate(source: str | Path, kwargs: dict[str, Any], *, code: bool = False) -> Path:
    """Return the folder of a checkpoint, after downloading it if it is on the hub.

    Args:
        source: a directory or a hub id.
        kwargs: arguments of ``from_pretrained``; those about the location of files are removed.
        code: whether to download Python files too.

    Raises:
        CheckpointError: if there is no such directory, or ``subfolder`` leads out of it.
        OSError: if the hub does not have it, or cannot be reached.

    Example:
        >>> locate(Path("no-such-model"), {})
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no such file or directory, and no hub id
    """
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    subfolder = kwargs.pop("subfolder", None) or ""
    place = Path(source)
    writer = recover(place)
    if place.is_dir():
        folder = place / subfolder
        if not folder.is_dir() or not folder.resolve().is_relative_to(place.resolve()):
            raise CheckpointError(f"it has no directory subfolder={subfolder!r}")
        if writer is not None and not (folder / "config.json").exists():
            raise CheckpointError(f"{writer} is writing it; wait until it is done")
        return folder
    if place.exists() or looks_like_path(source):
        raise CheckpointError("no such file or directory, and no hub id")
    return _fetch(str(source), subfolder, hub, kwargs.get("variant"), code)


def _fetch(
    source: str, subfolder: str, hub: dict[str, Any], variant: str | None, code: bool
) -> Path:
    """Download the files that loading reads, all from one revision of a repository."""
    if not hub.get("local_files_only"):
        places = {name: hub[name] for name in ("cache_dir", "revision") if name in hub}
        hub |= hub_options(source, subfolder, **places)

    def fetch(name: str, **options: Any) -> Path | None:
        found = cached_file(source, name, subfolder=subfolder, **hub, **options)
        return None if found is None else Path(found)

    config = fetch("config.json")
    if config is None:
        raise CheckpointError(f"{source} has no config.json")
    hub["revision"] = extract_commit_hash(str(config), None) or hub.get("revision")
    maybe = {"_raise_exceptions_for_missing_entries": False}
    for name in ("generation_config.json", REPORT_FILE):
        fetch(name, **maybe)
    if fetch(named(WEIGHTS, variant), **maybe) is None:
        index = fetch(named(INDEX, variant))
        for name in sorted(set(read_index(index).values())) if index else ():
            fetch(name)
    if code:
        keys = ("cache_dir", "local_files_only", "revision", "token")
        options = {key: hub[key] for key in keys if key in hub}
        pattern = f"{subfolder}/*.py" if subfolder else "*.py"
        snapshot_download(source, allow_patterns=[pattern], **options)
    return config.parent
