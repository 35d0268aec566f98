"""export: a model is written for a runtime that does not know tnlm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.checkpoint.exchange import check_writable, replace_directory
from tnlm.errors import OptionError, did_you_mean
from tnlm.runtimes import runtimes
from tnlm.runtimes.base import Runtime

logger = logging.getLogger("tnlm")


def export(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    to: str,
    type: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as files that a runtime reads without tnlm.

    Narrowed and dense layers are written as they are, and factored ones multiplied out, except
    for vLLM: what :func:`tnlm.compress` makes with ``portable=`` is as small there as here. The
    size is logged before anything is written, and a failure leaves the old files.

    Args:
        model: dense, or compressed by tnlm.
        directory: new or empty, unless ``overwrite``.
        to: ``"gguf"`` for llama.cpp, ``"transformers"`` for an ordinary checkpoint, ``"decilm"``
            for vLLM, SGLang and MLX where blocks differ in width, or ``"vllm"`` for vLLM with the
            plug-in tnlm-vllm, which runs factored layers as they are.
        type: of the weights, such as ``"F16"``; the first of the runtime's types if not given.
        tokenizer: written along.
        overwrite: replace what the directory holds.

    Returns:
        The directory.

    Raises:
        OptionError: for an unknown kind of file or type.
        ModelError: for a model that the runtime cannot execute; says why.
        CheckpointError: if the directory is not empty or cannot be written.
    """
    runtime, kind = writer_of(to, type)
    place = Path(directory)
    check_writable(place, overwrite=overwrite)
    made = runtime.prepare(model, tokenizer, kind)
    logger.info("writing %s for %s: %.1f MB of weights", place, runtime.name, made.bytes / 1e6)
    replace_directory(place, made.write, overwrite=overwrite)
    return place


def writer_of(to: str, type: str | None = None) -> tuple[Runtime, str]:
    """Return the runtime that reads a kind of file, and the type of the weights.

    Raises:
        OptionError: for an unknown kind of file or type.

    Example:
        >>> writer_of("gguf")[1]
        'F16'
    """
    found = {each.to: each for each in runtimes().values()}
    if to not in found:
        raise OptionError(f"unknown to={to!r}{did_you_mean(str(to), found)}", argument="to")
    runtime = found[to]
    kind = runtime.types[0] if type is None else type
    if kind not in runtime.types:
        raise OptionError(
            f"type={kind!r} with to={to!r}{did_you_mean(kind, runtime.types)}",
            argument=("type", "to"),
        )
    return runtime, kind
