"""The commands in groups: the help of ``tnlm``, which appears before torch is imported."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Annotated

import typer

import tnlm

ABOUT = "Compress language models with tensor networks and low-rank structure."
GROUPS = {
    "Start": {
        "demo": "Compress SmolLM2-135M-Instruct in four ways, and measure quality, size and speed.",
        "schemes": "List the named schemes.",
    },
    "Compress": {
        "plan": "Show what compress would do to every matrix, and the resulting cost.",
        "compress": "Compress a model and save it.",
        "heal": "Train LoRAs on a compressed model, merge them into its factors, and save it.",
        "rank-search": "Find the rank of every matrix by trial, and save the compressed model.",
    },
    "Measure": {
        "evaluate": "Measure perplexity on a text, benchmarks, or both, optionally beside a "
        "baseline.",
        "efficiency": "Measure latency, memory, size on disk and energy, alternating with a "
        "baseline.",
        "analyze": "Show where a model can be compressed: spectra of its weights, and of its "
        "outputs on data.",
    },
    "Look at the result": {
        "info": "Describe a compressed model from its files, without loading it.",
        "report": "Print what compression did to every matrix, or write it as an HTML page with "
        "pictures.",
        "generate": "Continue a text greedily.",
        "verify": "Check every file of a compressed model against the checksum from when it was "
        "saved.",
    },
    "Take it elsewhere": {
        "to-dense": "Multiply the factors out, and save an ordinary dense model.",
        "export": "Write a model for a runtime that does not know tnlm.",
        "serve": "Answer chats over HTTP, by `transformers serve` with tnlm registered.",
        "run": "Run a Python program, such as lm_eval, that can then load compressed models.",
    },
}
"""The first line of every command's docstring, by group and name."""
SETTINGS = {
    "add_completion": False,
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "help": ABOUT,
}
LIGHT = {"-h", "--help", "--version"}
"""What needs no command."""


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(tnlm.__version__)
        raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Compress language models with tensor networks and low-rank structure."""


def overview() -> typer.Typer:
    """Return a command line that has every command's name and text, and runs none."""
    app = typer.Typer(**SETTINGS)  # type: ignore[arg-type]
    app.callback()(options)
    for group, commands in GROUPS.items():
        for name, text in commands.items():
            app.command(name, help=text, rich_help_panel=group)(lambda: None)
    return app


def main() -> None:
    """Run the command line; what needs no command does not wait for torch."""
    if set(sys.argv[1:]) <= LIGHT:
        overview()()
    try:
        importlib.import_module("tnlm.cli.main").main()
    except KeyboardInterrupt:  # while torch is imported; commands end by themselves
        sys.exit(128 + signal.SIGINT)
