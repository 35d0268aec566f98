"""What the commands share: where they print, and how lists of numbers are read."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from tnlm.errors import OptionError

console = Console()


def print_json(value: Any) -> None:
    """Print a value as JSON and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def numbers(name: str, text: str | None) -> list[int] | None:
    """Return the whole numbers of an option such as ``48,32``.

    Raises:
        OptionError: if they are none.

    Example:
        >>> numbers("ranks", "8,16")
        [8, 16]
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--{name} {text!r}; allowed: whole numbers, as in 48,32") from error
