"""save and load: a directory is written whole or not at all, and read strictly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from tnlm.checkpoint.exchange import recover, replace_directory
from tnlm.errors import CheckpointError, ModelError, TnlmError
from tnlm.integrations.huggingface import GUARD, METHOD, TnlmConfig
from tnlm.reporting import Report

REPORT_FILE = "tnlm_report.json"

# What readers of configs and safetensors raise on broken files; a config may hold any JSON.
_READ_ERRORS = (
    OSError,
    SafetensorError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Write a compressed model as a Hugging Face directory that fails loudly without tnlm.

    All is written aside first and then moved into place: a failure leaves the old files, and what a
    killed process leaves is put in order by the next save or load of the directory. It may be a
    mount point, or a link to a directory. ``model.save_pretrained`` works too, without any of this.

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
        CheckpointError: if the directory is not empty, cannot be written, or is being written by
            another process.
    """
    if not isinstance(getattr(model.config, "quantization_config", None), TnlmConfig):
        raise ModelError("the model is not compressed by tnlm; use model.save_pretrained")
    _check_plain(model)
    target = Path(directory)

    def write(new: Path) -> None:
        model.save_pretrained(new, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        _set_guard(new)
        report = getattr(model, "tnlm_report", None)
        if isinstance(report, Report):
            (new / REPORT_FILE).write_text(report.to_json())

    replace_directory(target, write, overwrite=overwrite)
    return target


def _check_plain(model: PreTrainedModel) -> None:
    """Raise `ModelError` if a parameter is more than its numbers, as torchao's quantized ones."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ModelError(
                f"{name} is held as {type(parameter).__name__}, of which config.json says nothing; "
                "save the model first, and quantize it after loading"
            )


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
    model: PreTrainedModel
    recover(Path(directory))
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
    except _READ_ERRORS as error:
        raise CheckpointError(f"cannot load {directory}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = ", ".join(str(item) for item in sorted(info[problem], key=str)[:3])
            raise CheckpointError(f"{directory} has {problem.replace('_', ' ')}: {first}")
    return model


def _class_of(config: Any, directory: str | Path) -> Any:
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CheckpointError(f"{directory}/config.json names no known architecture: {names}")
    return cls


def describe(directory: str | Path) -> dict[str, Any]:
    """Return what a compressed directory's files say about it, without loading weights.

    Raises:
        CheckpointError: if it is no directory written by tnlm.
    """
    folder = Path(directory)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable config.json: {error}") from error
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{directory} was not written by tnlm")
    files = sorted(folder.glob("*.safetensors"))
    kinds = Counter(_formats_of(quantization["modules"]))
    return {
        "architecture": (config.get("architectures") or [None])[0],
        "scheme": quantization["scheme"],
        "options": quantization["options"],
        "format_version": quantization["format_version"],
        "modules": dict(sorted(kinds.items())),
        "parameters": sum(_parameters(file) for file in files),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        **_reported(folder),
    }


def _formats_of(modules: dict[str, Any]) -> Iterator[str]:
    for entry in modules.values():
        for part in entry.get("parts", [entry]):
            yield part.get("format", part.get("kind", "dense"))


def _parameters(file: Path) -> int:
    """Count the numbers of a safetensors file from its header; row orders do not count."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
            sizes = [math.prod(s.get_shape()) for s in slices if s.get_dtype() != "I64"]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return sum(sizes)


def _reported(folder: Path) -> dict[str, Any]:
    """Return the main figures of the report saved beside the model, if it is there."""
    path = folder / REPORT_FILE
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    names = ("parameters_before", "target_parameters_before", "target_parameters_after")
    return {name: report[name] for name in (*names, "macs_before", "macs_after", "metric")}
