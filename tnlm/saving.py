"""save and load: a directory is written whole or not at all, and read strictly."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from tnlm.errors import CheckpointError, ModelError, TnlmError
from tnlm.integrations.huggingface import GUARD, METHOD, TnlmConfig
from tnlm.reporting import Report

REPORT_FILE = "tnlm_report.json"


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
    leaves old files alone. ``model.save_pretrained`` works too, without this guard.

    Args:
        model: compressed by tnlm.
        directory: new or empty, unless ``overwrite``.
        tokenizer: saved along, if given.
        overwrite: replace what the directory holds.
        **kwargs: passed to ``save_pretrained``, e.g. ``max_shard_size``.

    Returns:
        The directory.

    Raises:
        ModelError: if the model is not compressed.
        CheckpointError: if the directory is not empty or cannot be written.
    """
    if not isinstance(getattr(model.config, "quantization_config", None), TnlmConfig):
        raise ModelError("the model is not compressed by tnlm; use model.save_pretrained")
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
            if target.exists():
                target.replace(Path(scratch) / "old")
            new.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error}; nothing was changed there"
        ) from error
    return target


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


def load(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a compressed model, every tensor of it, in the class it was saved from.

    Args:
        directory: written by :func:`save` or ``save_pretrained``; or a hub id.
        **kwargs: passed to ``from_pretrained``, e.g. ``dtype`` or ``device_map``.

    Raises:
        CheckpointError: if the directory is no tnlm checkpoint, a file is missing or truncated, or
            any tensor is missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError

    try:
        config = AutoConfig.from_pretrained(directory)
        quantization = getattr(config, "quantization_config", None) or {}
        if dict(quantization).get("quant_method") != METHOD:
            raise CheckpointError(
                f"{directory} was not written by tnlm; use AutoModel.from_pretrained"
            )
        cls = _class_of(config, directory)
        model, info = cls.from_pretrained(directory, output_loading_info=True, **kwargs)
    except TnlmError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot load {directory}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = ", ".join(str(item) for item in sorted(info[problem], key=str)[:3])
            raise CheckpointError(f"{directory} has {problem.replace('_', ' ')}: {first}")
    return model


def _class_of(config: Any, directory: str | Path) -> Any:
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise CheckpointError(f"{directory}/config.json names no known architecture: {names}")
    return cls


def read_report(directory: str | Path) -> dict[str, Any]:
    """Return the report saved beside a model, or an empty one if there is none."""
    path = Path(directory) / REPORT_FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
