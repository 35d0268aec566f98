"""Helpers that the commands share: the console, JSON, plan tables, and lists of numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Column, Table

from tnlm.errors import OptionError
from tnlm.plans.plan import HEADINGS, LayerPlan, row
from tnlm.plans.report import Report
from tnlm.utils.names import beginning, unprefixed

T = TypeVar("T", int, float)

console = Console()


def print_json(value: Any) -> None:
    """Print a value as JSON and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_report(report: Report, as_json: bool) -> None:
    """Print what a compression did, as a table with totals or as JSON."""
    if as_json:
        print_json(report.to_dict())
        return
    console.print(layers_table(report.plan.layers))
    lines = [*report.plan.left(), *report.summary()]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def printable(value: object) -> str:
    r"""Return a value as text that any terminal can print.

    Example:
        >>> printable("a\x1b[2J\ud800")
        'a?[2J?'
    """
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))


def numbers(name: str, text: str | None, kind: type[T] = int) -> list[T] | None:
    """Parse an option that lists numbers, such as ``48,32``.

    Args:
        name: the option.
        text: the option's value, or None.
        kind: type of the numbers, int or float.

    Raises:
        OptionError: if the text is no list of such numbers.

    Example:
        >>> numbers("ranks", "8,16")
        [8, 16]
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        allowed = "whole numbers, such as 48,32" if kind is int else "numbers, such as 0.25,0.5"
        raise OptionError(f"--{name} {text!r}; allowed: {allowed}") from error


def layers_table(layers: Sequence[LayerPlan]) -> Table:
    """Return a plan as a table, with the common prefix of all names in its title."""
    long = ("target", "spec")
    columns = [Column(name, no_wrap=name not in long, overflow="fold") for name in HEADINGS]
    found = [layer.name for layer in layers]
    names, title = unprefixed(found), f"matrices of {beginning(found).strip('.') or 'the model'}"
    table = Table(*columns, title=title, box=None, padding=(0, 1, 0, 0))
    for layer in layers:
        table.add_row(names[layer.name], *row(layer)[1:])
    return table
