"""Words an error for the shell: where the library says ``keep_targets=``, a command has options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping

from tnlm.errors import TnlmError

VALUE = r"""'[^']*'|"[^"]*"|\([^()]*\)|\[[^\[\]]*\]|-?\w[^\s,;:)]*"""
"""A value as Python writes it: text, a tuple, a list, or a word."""
BEFORE = r"(?<![\w./'\\?&-])"
"""An argument begins here, and not the part of a path, of an address or of quoted text."""
GIVEN = {"tokenizer": "a tokenizer in MODEL"}
"""What the library asks for, and a command finds by itself."""


def in_options(error: TnlmError, options: Mapping[str, str]) -> str:
    """Return an error's message with options in place of the arguments that it names.

    Arguments that are no option of the command stay as they are.

    Args:
        error: what the library says.
        options: the command's options by the keyword for which each stands.

    Example:
        >>> error = TnlmError("keep=0.8 with metric='input'", argument=("keep", "metric"))
        >>> in_options(error, {"keep": "--keep", "metric": "--metric"})
        '--keep 0.8 with --metric input'
    """
    message, shell = str(error), {**GIVEN, **options}
    named = {name: shell[name] for name in error.arguments if name in shell}
    if not named:
        return message
    # An argument is written `name=`; one that never is, by its name alone.
    bare = {name for name in named if f"{name}=" not in message and f"{name}<=" not in message}

    def shown(found: re.Match[str]) -> str:
        name, sign, value = found.groups()
        if sign is None:
            return named[name] if name in bare else found[0]
        return _assigned(named[name], sign, value)

    names = "|".join(sorted(named, key=len, reverse=True))
    return re.sub(rf"{BEFORE}({names})(?![\w/])(?:(<?=)({VALUE})?)?", shown, message)


def _assigned(option: str, sign: str, text: str | None) -> str:
    """Return an option with its value as it is typed: ``--out-split 4,8`` for ``(4, 8)``."""
    if text is None:
        return option
    value, rest = _read(text)
    if sign == "<=":
        return f"{option} of at most {text}"
    if value is None:
        return f"no {option}{rest}"
    if isinstance(value, bool):
        return (option if value else f"--no-{option.removeprefix('--')}") + rest
    if isinstance(value, list | tuple):
        return f"{option} {','.join(map(str, value))}{rest}"
    return f"{option} {shlex.quote(value) if isinstance(value, str) else value}{rest}"


def _read(text: str) -> tuple[object, str]:
    """Return a value that Python wrote, and a full stop that may follow it."""
    for end in (len(text), len(text.rstrip("."))):
        try:
            return ast.literal_eval(text[:end]), text[end:]
        except (ValueError, SyntaxError):
            continue
    return text, ""
