"""Read text files and tokenise whole texts, the same way for calibration and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text(path: str | Path) -> str:
    """Read a text file; a ``.jsonl`` gives the ``text`` fields of its lines, joined by blank lines.

    Args:
        path: a UTF-8 file.

    Example:
        >>> read_text("no such file.txt")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: no such file.txt: no such file; ...
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise CalibrationError(
            f"{path}: no such file; give an existing text or .jsonl file"
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file: {err}") from err
    if path.suffix != ".jsonl":
        return text
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it breaks at.
    lines = enumerate(text.split("\n"), start=1)
    return "\n\n".join(_text_field(line, f"{path}:{n}") for n, line in lines if line.strip())


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenise a whole text once, without special tokens, to ids of shape ``(tokens,)``."""
    # verbose=False: a text longer than the model is expected, it is cut into windows later.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _text_field(line: str, where: str) -> str:
    """Return the ``text`` of one JSON line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as err:
        raise CalibrationError(f"{where}: not valid JSON: {err}") from err
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: no string 'text'; every line must be {{\"text\": ...}}")
    return text
