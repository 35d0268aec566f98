"""Loads the model of a command, and says so first, as it may take minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tnlm.cli.jobs import is_first


def load(model: str, *, dtype: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer, after a line on stderr that names it.

    Args:
        model: a directory, a ``.gguf`` file or a hub id.
        dtype: of the weights; ``"auto"`` for that of the checkpoint.

    Raises:
        CheckpointError: if there is no such model, before anything is said.
    """
    from tnlm.checkpoint.dense_models import check_source, load_model

    check_source(model)
    if is_first():
        sys.stderr.write(f"loading {model} ...{_note(model, dtype)}\n")
        sys.stderr.flush()
    return load_model(model, dtype=dtype)


def _note(model: str, dtype: str) -> str:
    """Return what becomes of quantized weights, which take more memory than their file.

    Example:
        >>> _note("small.gguf", "auto")
        ' its weights become float32; --dtype bfloat16 takes half the memory'
        >>> _note("directory", "auto")
        ''
    """
    if Path(model).suffix != ".gguf":
        return ""
    if dtype != "auto":
        return f" its weights become {dtype}"
    return " its weights become float32; --dtype bfloat16 takes half the memory"
