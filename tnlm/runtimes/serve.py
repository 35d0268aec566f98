"""serve: transformers' own server answers chats with a compressed model."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tnlm.checkpoint.json_file import read_object
from tnlm.errors import CheckpointError, ModelError
from tnlm.runtimes.run import run

logger = logging.getLogger("tnlm")

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
"""What the server of transformers needs, by `transformers.utils.is_serve_available`."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files one of which every tokenizer has."""

SERVER, COMPILING = "transformers.cli.transformers", "tnlm.runtimes.compiled_server"
"""Modules whose main program is the server; that of transformers compiles on GPUs only."""


def serve(directory: str | Path, options: Sequence[str] = ()) -> NoReturn:
    """Replace this process by ``transformers serve DIRECTORY``, with tnlm registered.

    Args:
        directory: a model, compressed or not, with its tokenizer.
        options: of ``transformers serve``, such as ``("--port", "8000")``; ``"--compile"`` compiles
            decoding on the CPU as well.

    Raises:
        CheckpointError: if the directory holds no model, or no tokenizer.
        ModelError: if a package that the server needs is not installed.
    """
    check_servable(Path(directory))
    server = COMPILING if "--compile" in options else SERVER
    run([sys.executable, "-m", server, "serve", str(directory), *options])


def check_servable(directory: Path) -> None:
    """Raise if a server could not answer from a directory; warn if it could not answer chats.

    Raises:
        CheckpointError: if the directory holds no model, or no tokenizer.
        ModelError: if a package that the server needs is not installed.

    Example:
        >>> check_servable(Path("no-such-model"))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-model holds no model: there is no config.json
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} holds no model: there is no config.json")
    said = read_object(directory / "config.json").get("quantization_config")
    if isinstance(said, dict) and said.get("runtime") == "vllm":
        raise CheckpointError(
            f"{directory} was exported for vLLM, which alone runs it: `vllm serve {directory}`; "
            "serve the directory that it was exported from"
        )
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(
            f"{directory} holds no tokenizer, so texts cannot be served; save it along: "
            "tnlm.save(model, directory, tokenizer=tokenizer)"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"serving needs {', '.join(missing)}: pip install 'tnlm[serve]'")
    if not _has_chat_template(directory):
        logger.warning("%s has no chat template: it answers /v1/completions only", directory)


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"  # where earlier versions kept it
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
