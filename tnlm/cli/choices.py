"""Command-line options for every keyword of `tnlm.compress`, from its one definition."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tnlm.cli.options import (
    DATA,
    Gauge,
    InSplit,
    OutSplit,
    Rank,
    Ranks,
    Ridge,
    Sweeps,
    Terms,
    Width,
)
from tnlm.cli.output import numbers
from tnlm.compression.choices import GROUPS, Choice, choices_of
from tnlm.errors import OptionError

Command = TypeVar("Command", bound=Callable[..., None])
PANELS = {
    "scheme": "Method",
    "calibration": "Data",
    "budget": "Size",
    "recovery": "Recovery",
}
TYPES: Mapping[str, Any] = {
    "int": int | None,
    "int | None": int | None,
    "float": float | None,
    "float | None": float | None,
    "str": str | None,
    "str | None": str | None,
    "bool": bool | None,
    "str | tuple[str, str] | None": str | None,
    "bool | str | None": bool | None,
    "str | Path | None": Path | None,
    "Any": Any,
}
"""The type of an option for each annotation; an option not given is None."""
FORMAT_OPTIONS: Mapping[str, Any] = {
    "terms": Terms,
    "rank": Rank,
    "ranks": Ranks,
    "width": Width,
    "out_split": OutSplit,
    "in_split": InSplit,
    "gauge": Gauge,
    "ridge": Ridge,
    "sweeps": Sweeps,
}
OWN = {"model", "targets", "ignore", "progress", *GROUPS, *(each.keyword for each in choices_of())}
"""Keywords that ``--set`` rejects: they have their own options, or exist only in Python."""
LISTS = ("ranks", "out_split", "in_split")
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other option of the scheme's formats, in JSON: --set sweeps=40.",
        rich_help_panel="Size",
    ),
]


def with_choices(command: Command) -> Command:
    """Add an option for every keyword of `tnlm.compress` to a command that takes ``**given``."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    named = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
    formats = [_parameter(name, kind) for name, kind in FORMAT_OPTIONS.items()]
    rest = [_parameter(each.keyword, _annotation(each)) for each in choices_of() if each.shell]
    found = [*named, *formats, _parameter("set_", Set), *rest]
    command.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in found}
    return command


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _annotation(each: Choice) -> Any:
    flag = f"--{each.keyword.replace('_', '-')}"
    names = [f"{flag}/--no-{flag[2:]}"] if "bool" in each.type else [flag]
    read = DATA if each.type == "Any" else {}
    panel = PANELS[each.group]
    option = typer.Option(*names, help=each.text, rich_help_panel=panel, **read)
    return Annotated[TYPES[each.type], option]


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the typed options as keywords of `tnlm.compress`.

    Raises:
        OptionError: if a list or a value of ``--set`` cannot be read.

    Example:
        >>> asked({"ranks": "8,16", "keep": None, "set_": ["sweeps=40"]})
        {'ranks': [8, 16], 'sweeps': 40}
    """
    typed = {name: value for name, value in given.items() if value is not None}
    for item in typed.pop("set_", []):
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise OptionError(f"--set {item!r}; allowed: NAME=VALUE, such as sweeps=40")
        if name in OWN or name in typed:
            raise OptionError(f"--set {item}; {name!r} is given elsewhere; allowed: other options")
        typed[name] = _value(name, value)
    for name in LISTS:
        if isinstance(typed.get(name), str):
            typed[name] = numbers(name.replace("_", "-"), typed[name])
    return typed


def read_plan(path: Path | None, scheme: str | None, given: dict[str, Any]) -> Any:
    """Return the plan in a file, or the scheme; check the request before a model is loaded."""
    from tnlm.calibration.cache import check_cache
    from tnlm.compression.choices import gather_choices
    from tnlm.compression.data import check_data, data_for
    from tnlm.compression.request import request_of
    from tnlm.plans.plan import Plan

    if given.get("cache_dir") is not None:
        check_cache(given["cache_dir"])
    if path is None and scheme is None:
        raise OptionError("no scheme and no plan given; give --scheme or --plan")
    if path is None:
        asked = gather_choices(str(scheme), given)
        request = request_of(asked)
        check_data(request, data_for(request, asked.calibration))
        return scheme
    if scheme is not None:
        raise OptionError("--scheme and --plan are both given; a plan already holds its scheme")
    return Plan.load(path)


def _value(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"--set {name}={text}; allowed: a number, true, false or a list such as [8,16]"
        ) from error
