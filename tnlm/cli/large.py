"""The options of models that are larger than memory, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tnlm.cli.jobs import workers_here
from tnlm.cli.loading import load
from tnlm.cli.output import console, print_json
from tnlm.errors import OptionError
from tnlm.plans.report import Report

Memory = Annotated[
    str | None,
    typer.Option(
        help="Compress block by block, from files to files, within this much memory: 6GB.",
        rich_help_panel="Large models",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Compress block by block, with temporary files in this folder.",
        rich_help_panel="Large models",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Compute on this device: cuda:0. Block by block, only one block is there at a time.",
        rich_help_panel="Large models",
    ),
]
Resources = Annotated[
    bool,
    typer.Option(
        "--resources",
        help="Show only the memory and disk that compressing block by block needs.",
        rich_help_panel="Large models",
    ),
]


def load_on(model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Return a model on a device, and its tokenizer."""
    from tnlm.utils.device import device_of

    place = device_of(device)
    loaded, tokenizer = load(model, dtype=dtype)
    return loaded.to(place), tokenizer


def check_nothing_runs(**given: Any) -> None:
    """Raise `OptionError` if an option that only a run needs is given beside --resources."""
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"--resources runs nothing, so --{name} has no effect; leave it out")


def show_resources(model: str, scheme: str, as_json: bool, **choices: Any) -> None:
    """Print what compressing block by block needs."""
    from tnlm.streaming.compress import predict_resources

    found = predict_resources(model, scheme, **choices)
    if as_json:
        print_json(found.to_dict())
        return
    console.print("\n".join(found.lines()), highlight=False, soft_wrap=True)


def compress_on_disk(
    model: str,
    out: Path,
    scheme_or_plan: Any,
    **choices: Any,
) -> Report:
    """Compress block by block, and return the report."""
    from tnlm.streaming.compress import compress_files

    return compress_files(model, out, scheme_or_plan, workers=workers_here(), **choices)
