"""Loads a model and its tokenizer from a directory, a GGUF file or the hub."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

from tnlm.checkpoint.hub import hub_options
from tnlm.errors import CheckpointError, OptionError, TnlmError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Errors that the readers of configs, safetensors and GGUF files raise on a broken file;
# SafetensorError is added where safetensors is imported.
_READ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, struct.error)
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".onnx", ".zip"}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_model(
    source: str | Path, *, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model that can be compressed, saved and trained, with its tokenizer.

    The model has the class named in its config, such as a masked language model or a classifier,
    or else is a causal language model.

    Args:
        source: a model directory, a ``.gguf`` file (its weights are dequantized), or a hub id.
        dtype: dtype of the weights; ``"auto"`` keeps the checkpoint's, and gives float32 for GGUF.

    Returns:
        The model and its tokenizer, or None if a directory has no tokenizer.

    Example:
        >>> load_model("./no/such/model")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: ./no/such/model: no such file or directory, and no hub id; ...
    """
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}{did_you_mean(dtype, DTYPES)}", argument="dtype")
    place, options = _locate(source)
    try:
        tokenizer = _read_tokenizer(place, options)
        model, missing = _read_model(place, options, dtype)
    except (TnlmError, OutOfMemoryError):
        raise
    except (*_READ_ERRORS, SafetensorError) as err:
        raise CheckpointError(f"{source}: cannot be loaded: {_cause(err)}") from err
    if missing:  # transformers would use random values instead
        raise CheckpointError(
            f"{source}: {len(missing)} tensors of {type(model).__name__} are not in the "
            f"checkpoint, e.g. {missing[0]}; give a whole checkpoint of that class"
        )
    return model, tokenizer


def check_source(source: str | Path) -> None:
    """Raise `CheckpointError` for a model that is not there; the hub is not asked for an id.

    Example:
        >>> check_source("./no/such/model")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: ./no/such/model: no such file or directory, and no hub id; ...
    """
    _locate(source)


def _locate(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the arguments of ``from_pretrained``, or raise `CheckpointError`."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{source}: no such file; give an existing .gguf file")
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(
                f"{source}: reading .gguf files needs a package that is not installed: "
                "pip install 'tnlm[gguf]'"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{source}: no config.json there; give a model directory")
        return str(path), {}
    if path.exists():
        raise CheckpointError(
            f"{source}: not a .gguf file; give the directory that holds config.json"
        )
    if looks_like_path(source):
        raise CheckpointError(
            f"{source}: no such file or directory, and no hub id; give a model directory, a .gguf "
            "file or a hub id"
        )
    try:
        return str(source), hub_options(str(source))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def looks_like_path(source: str | Path) -> bool:
    """Return whether a source that does not exist was meant as a path, not a hub id.

    A hub id is ``name`` or ``owner/name``, as the hub allows them; if there is a directory
    ``owner``, a path is meant.

    Example:
        >>> [looks_like_path(name) for name in ("gpt2", "owner/name-1.5", "./gpt2", "a.bin")]
        [False, False, True, True]
    """
    name = str(source)
    if isinstance(source, Path) or Path(name).suffix.lower() in _FILE_SUFFIXES:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return "/" in name and Path(name).parent.is_dir()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model's directory, or None if it has none."""
    return _read_tokenizer(*_locate(source))


def _read_tokenizer(place: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer, or return None; without one, transformers would create an empty one."""
    from transformers import AutoTokenizer

    folder = Path(place)
    found = [file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)]
    if folder.is_dir() and not options and not found:
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, trust_remote_code=False, **options
    )
    return tokenizer


def _read_model(
    place: str, options: dict[str, Any], dtype: str | torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load the model; return it with the names of missing tensors."""
    from transformers import AutoModelForCausalLM, GgufConfig

    kind: Any = AutoModelForCausalLM
    if "gguf_file" in options:
        # Otherwise the model counts as quantized and cannot be saved.
        options = options | {"quantization_config": GgufConfig(dequantize=True)}
    else:
        kind = class_of(place, **options) or kind
    # Without trust_remote_code, transformers asks on the terminal whether to run code.
    options = options | {"dtype": dtype, "trust_remote_code": False}
    loaded: Any = kind.from_pretrained(place, output_loading_info=True, **options)
    model, info = loaded
    return model, sorted(info["missing_keys"])


def class_of(place: str, **options: Any) -> type[PreTrainedModel] | None:
    """Return the class that a config names, if it is in transformers and fits the config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(place, **options)
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    return found if isinstance(config, found.config_class or ()) else None


def _cause(err: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(err).split()) or type(err).__name__
