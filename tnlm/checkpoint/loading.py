"""load: reads a compressed model from its own files, every tensor and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import OutOfMemoryError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tnlm.checkpoint.configuration import check_config
from tnlm.checkpoint.folder import Stored, file_of, read_headers, weight_files
from tnlm.checkpoint.json_file import read_object, shortened
from tnlm.checkpoint.location import locate
from tnlm.checkpoint.modules import at_most
from tnlm.checkpoint.sums import verify as verify_sums
from tnlm.checkpoint.tensors import FLOATS
from tnlm.errors import CheckpointError, OptionError, TnlmError

logger = logging.getLogger(__name__)

ELSEWHERE = ("gguf_file", "state_dict", "adapter_kwargs", "from_tf", "from_flax")
"""Arguments of ``from_pretrained`` that would read weights from elsewhere."""


def load(
    directory: str | Path, *, verify: bool = False, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a compressed model completely, in the class it was saved from.

    Weights come from the safetensors files in the directory. Adapters and pickled weights beside
    them are not read, and code in the checkpoint does not run unless it is trusted.

    Args:
        directory: a directory written by :func:`save` or ``save_pretrained``, or a hub id.
        verify: first check every file against the SHA-256 sums in the report, as :func:`verify`.
        trust_remote_code: run code in the checkpoint, for its own model classes.
        **kwargs: passed to ``from_pretrained``, e.g. ``dtype`` or ``device_map``; ``subfolder``,
            ``revision``, ``token``, ``cache_dir`` and the like set where the files are.

    Raises:
        CheckpointError: if the directory is not a tnlm checkpoint; if a file is missing, truncated,
            outside the directory or does not match its sum; or if a tensor is missing, unexpected,
            not finite, or has the wrong shape or dtype.
        OptionError: if an argument would read weights from elsewhere.
    """
    _check_arguments(kwargs)
    try:
        folder = locate(directory, kwargs, code=trust_remote_code)
        if verify:
            verify_sums(folder)
        return _load(folder, trust_remote_code, kwargs)
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {directory}: {error}") from error
    except (TnlmError, OutOfMemoryError):
        raise
    except Exception as error:  # a config may hold anything, and lead anywhere in transformers
        cause = f"{type(error).__name__}: {shortened(error)}"
        raise CheckpointError(f"cannot load {directory}: {cause}") from error


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name in ELSEWHERE:
        if kwargs.get(name):
            raise OptionError(f"{name}= cannot be used: tnlm.load reads a checkpoint's safetensors")
    if kwargs.get("use_safetensors") is False:
        raise OptionError("use_safetensors=False; allowed: True; pickled weights are not read")


def _load(folder: Path, trusted: bool, kwargs: dict[str, Any]) -> PreTrainedModel:
    stored = read_object(file_of(folder, "config.json"))
    check_config(stored, trusted)
    if (folder / "generation_config.json").exists():
        read_object(file_of(folder, "generation_config.json"))
    if (folder / "adapter_config.json").exists():
        logger.warning("%s has an adapter, which is not applied; load it with PeftModel", folder)
    files, listed = weight_files(folder, kwargs.get("variant"))
    headers = read_headers(files, listed)
    if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
        _check_dtype(stored.get("dtype", stored.get("torch_dtype")), headers)
    if not trusted and stored.get("auto_map") and not _known(stored.get("model_type")):
        raise CheckpointError(
            "config.json has a model_type that is not in transformers; pass trust_remote_code=True "
            "to run the code in the checkpoint"
        )
    # Keeps the model trainable, wherever it is loaded.
    with at_most(100 * len(headers) + 10_000), torch.inference_mode(False):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        cls = _class_of(config, folder, trusted)
        model, info = cls.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trusted,
            # Adapters are looked for in this folder, which does not exist: it is a file.
            adapter_kwargs={"subfolder": "config.json"},
            **{name: value for name, value in kwargs.items() if name != "use_safetensors"},
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = ", ".join(str(item) for item in sorted(info[problem], key=str)[:3])
            raise CheckpointError(f"it has {problem.replace('_', ' ')}: {shortened(first)}")
    loaded: PreTrainedModel = model
    return loaded


def _known(model_type: object) -> bool:
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _check_dtype(named: object, headers: dict[str, Stored]) -> None:
    """Raise `CheckpointError` if the config's dtype is not the one in which tensors are stored."""
    kinds = {str(dtype).removeprefix("torch."): kind for dtype, kind in FLOATS.items()}
    if named is None:
        return
    kind = kinds.get(str(named).removeprefix("torch."))
    if kind is None:
        raise CheckpointError(f"config.json has dtype {named!r}; allowed: {', '.join(kinds)}")
    if kind not in {stored.dtype for stored in headers.values()}:
        raise CheckpointError(f"config.json has dtype {named!r}, but no tensor is stored as {kind}")
    narrow = {"F64": ("F32", "F16", "BF16"), "F32": ("F16", "BF16"), "F16": ("BF16",)}
    for name, stored in headers.items():
        if stored.dtype in narrow.get(kind, ("F16",)):
            raise CheckpointError(
                f"{name} is stored as {stored.dtype}, but config.json has dtype {named!r}; pass "
                "dtype= to load every tensor in one dtype",
                argument="dtype",
            )


def _class_of(config: Any, folder: Path, trusted: bool) -> Any:
    """Return the class that a model was saved from, in transformers or in the checkpoint."""
    names = config.architectures or []
    name = names[0] if isinstance(names, list) and names else None
    own = getattr(config, "auto_map", None) or {}
    for kind, reference in own.items() if trusted else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            brought: Any = get_class_from_dynamic_module(reference, str(folder))
            brought.register_for_auto_class(kind)  # so that saving it again writes its code
            return brought
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        hint = "; pass trust_remote_code=True to run the code in the checkpoint" if own else ""
        raise CheckpointError(
            f"config.json names no known architecture: {shortened(names, 80)}{hint}"
        )
    if not (isinstance(cls.config_class, type) and isinstance(config, cls.config_class)):
        raise CheckpointError(f"{name} does not fit the model type {config.model_type!r}")
    return cls
