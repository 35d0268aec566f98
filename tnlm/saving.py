"""save: a directory is written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tnlm.checkpoint.sums import REPORT_FILE, record_sums
from tnlm.errors import CheckpointError, ModelError
from tnlm.integrations.huggingface import GUARD, description
from tnlm.reporting import Report


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Write a compressed model as a Hugging Face directory that fails loudly without tnlm.

    Everything is written beside the directory first and then moved into place, so that a failure
    leaves old files alone. ``model.save_pretrained`` writes the same files, but for the report.

    Args:
        model: compressed by tnlm.
        directory: new or empty, unless ``overwrite``.
        tokenizer: saved along, if given.
        overwrite: replace what the directory holds.
        **kwargs: passed to ``save_pretrained``, e.g. ``max_shard_size``.

    Returns:
        The directory.

    Raises:
        ModelError: if the model is not compressed, or was quantized by another library since.
        CheckpointError: if the directory is not empty or cannot be written.
    """
    if description(model) is None:
        raise ModelError("the model is not compressed by tnlm; use model.save_pretrained")
    _check_plain(model)
    target = Path(directory)
    check_writable(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            model.save_pretrained(new, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            _set_guard(new)
            report = getattr(model, "tnlm_report", None)
            if isinstance(report, Report):
                (new / REPORT_FILE).write_text(report.to_json())
            record_sums(new)
            move_into_place(new, target, Path(scratch) / "old")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {target}: {error}; nothing was changed there"
        ) from error
    return target


def _check_plain(model: PreTrainedModel) -> None:
    """Raise `ModelError` if a parameter is more than its numbers, as torchao's quantized ones."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ModelError(
                f"{name} is held as {type(parameter).__name__}, of which config.json says nothing; "
                "save the model first, and quantize it after loading"
            )


def move_into_place(new: Path, target: Path, old: Path) -> None:
    """Move a directory to its place; what was there goes to ``old``, and back if this fails."""
    if target.exists():
        target.replace(old)
    try:
        new.replace(target)
    except BaseException:
        if old.exists():
            old.replace(target)
        raise


def check_writable(directory: Path, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` unless a directory can be made or is empty.

    Example:
        >>> check_writable(Path("a-new-directory"))
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise CheckpointError(f"{directory} is not empty; choose another, or pass overwrite")
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{directory} cannot be written: no permission in {parent}")


def _set_guard(directory: Path) -> None:
    """Point transformers at a file that does not exist; only the plug-in takes this back."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["transformers_weights"] = GUARD
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
