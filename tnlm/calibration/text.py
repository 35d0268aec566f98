"""Reads text files and tokenises whole texts, in the same way for calibration and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tnlm.calibration.files import is_lines, read_file, read_lines
from tnlm.errors import CalibrationError, OptionError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file; for ``.jsonl``, join the lines' ``text`` fields by blank lines.

    Args:
        path: a file in UTF-8, or in UTF-16 with a byte order mark; possibly gzipped.

    Example:
        >>> read_text("no such file.txt")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: no such file.txt: no such file; ...
    """
    if not is_lines(Path(path)):
        return read_file(path)
    return "\n\n".join(text_field(row, where) for where, row in read_lines(path))


def text_field(row: Mapping[str, Any], where: str) -> str:
    """Return the ``text`` of one row; errors name its location."""
    text = row.get("text")
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: no string 'text'; every line must be {{\"text\": ...}}")
    return text


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenise a whole text once, without special tokens, to ids of shape ``(tokens,)``.

    Raises:
        CalibrationError: if the text has unpaired surrogates, which JSON can contain.
    """
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise CalibrationError(f"the text has an unpaired surrogate: {err}") from err
    # verbose=False: the text may exceed the model's length, since it is cut into windows later.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def check_bos(bos: object) -> None:
    """Raise `OptionError` unless ``bos`` is ``"auto"``, True or False; 1 and 0 are not allowed."""
    if not isinstance(bos, bool) and not (isinstance(bos, str) and bos == AUTO):
        hint = did_you_mean(str(bos), [AUTO])
        raise OptionError(f"bos={bos!r}{hint}, True or False", argument="bos")


def start_token(tokenizer: PreTrainedTokenizerBase, bos: bool | str = AUTO) -> int | None:
    """Return the token at the start of every window of text, or None.

    Args:
        tokenizer: the model's tokenizer.
        bos: True for the BOS token, False for none, or ``"auto"`` for the BOS token if the
            tokenizer adds it by default.

    Raises:
        OptionError: if ``bos`` has another value, or the tokenizer has no BOS token.
    """
    check_bos(bos)
    if bos is False:
        return None
    token = getattr(tokenizer, "bos_token_id", None)
    if bos is True and token is None:
        raise OptionError(
            "bos=True, but the tokenizer has no BOS token; use bos='auto' or False", argument="bos"
        )
    if bos is True or token is None:
        return token
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    own = tokenizer("a")["input_ids"]
    return token if len(own) > len(plain) and own[0] == token else None
