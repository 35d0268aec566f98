"""Rewrites errors for the shell: options take the place of keywords such as ``keep_targets=``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

VALUE = r"""'[^']*'|"[^"]*"|\([^()]*\)|\[[^\[\]]*\]|-?\w[^\s,;:)]*"""
"""A value as Python writes it: text, a tuple, a list, or a word."""
BOUNDS = {"<=": "of at most", ">=": "of at least"}
GIVEN = {"tokenizer=": "a tokenizer in MODEL"}
"""Arguments that the library asks for, but a command finds by itself."""
BEFORE = r"(?<![\w./'\\?&-])"
"""Start of a keyword, but not of a part of a path, an address or quoted text."""


def in_options(message: str, options: Mapping[str, str], typed: Sequence[str] = ()) -> str:
    """Replace keywords in an error message by command-line options.

    A word is a keyword if "=" follows it, if it follows "pass", or if it is in a list of keywords.
    Names that are not options of the command stay as they are.

    Args:
        message: the library's message.
        options: the command's options, by keyword.
        typed: words of the command line, such as file names, which are not read as keywords.

    Example:
        >>> options = {"keep": "--keep", "keep_targets": "--keep-targets", "metric": "--metric"}
        >>> in_options("keep_targets=0.8 with metric='input'; pass keep=", options)
        '--keep-targets 0.8 with --metric input; pass --keep'
    """
    for words, plain in GIVEN.items():
        message = re.sub(rf"\b{words}", plain, message)
    if not options:
        return message
    kept = sorted((word for word in typed if "=" in word), key=len, reverse=True)
    for number, word in enumerate(kept):
        message = message.replace(word, f"\0{number}\0")
    name = "|".join(sorted(options, key=len, reverse=True))

    def assigned(found: re.Match[str]) -> str:
        option, value = options[found[1]], found[2]
        if value in ("None", "None."):
            return f"no {option}{value[4:]}"
        if value in ("True", "False"):
            return option if value == "True" else f"--no-{option.removeprefix('--')}"
        return option if value is None else f"{option} {_plain(value)}"

    def named(found: re.Match[str]) -> str:
        return re.sub(rf"\b({name})\b", lambda each: options[each[0]], found[0])

    alone = rf"{BEFORE}(?:{name})(?![\w/'=-]|\.\w)"
    listed = rf"{alone}(?:(?:, | and | or | \+ ){alone})+"
    message = re.sub(rf"{listed}|(?<=pass ){alone}", named, message)
    for sign, words in BOUNDS.items():
        message = re.sub(rf"{BEFORE}({name}){sign}", rf"\1= {words} ", message)
    message = re.sub(rf"{BEFORE}({name})=(?!=)({VALUE})?", assigned, message)
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], message)


def _plain(value: str) -> str:
    """Return a value as it is typed: ``input`` for ``'input'``, ``4,8`` for ``(4, 8)``."""
    if re.fullmatch(r"'[\w./,-]+'", value):
        return value[1:-1]
    if re.fullmatch(r"[(\[]-?[\d.]+(, -?[\d.]+)*,?[)\]]", value):
        return value[1:-1].rstrip(",").replace(" ", "")
    return value.replace("\\\\", "\\")  # repr doubles backslashes
