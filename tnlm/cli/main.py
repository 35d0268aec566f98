"""The command line: every command calls one public function."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from typer.main import get_command

import tnlm
from tnlm.cli.after import after
from tnlm.cli.choices import asked, read_plan, with_choices
from tnlm.cli.jobs import Jobs, check_jobs, is_first, needs_start, run_jobs, workers_here
from tnlm.cli.large import (
    Device,
    Memory,
    Resources,
    Scratch,
    check_nothing_runs,
    compress_on_disk,
    load_on,
    show_resources,
)
from tnlm.cli.options import (
    FILE,
    Dtype,
    Ignore,
    Json,
    Model,
    Overwrite,
    SchemeName,
    Targets,
)
from tnlm.cli.output import console, layers_table, print_json, print_report, printable
from tnlm.cli.overview import SETTINGS, options
from tnlm.cli.studies import studies
from tnlm.cli.words import in_options
from tnlm.errors import TnlmError
from tnlm.utils.files import check_file

app = typer.Typer(**SETTINGS)  # type: ignore[arg-type]
app.callback()(options)
app.add_typer(after)
app.add_typer(studies)


@app.command()
def schemes(as_json: Json = False) -> None:
    """List the named schemes."""
    from tnlm.schemes import schemes as found

    if as_json:
        fields = (
            "title",
            "formats",
            "metric",
            "allocation",
            "cascade",
            "anchor",
            "refine_passes",
            "targets",
            "needs",
            "source",
        )
        rows = {n: {f: getattr(s, f) for f in fields} for n, s in found().items()}
        print_json(rows)
        return
    table = Table("scheme", "what it does", "needs", "source", box=SIMPLE)
    for name, scheme in found().items():
        table.add_row(name, scheme.title, scheme.needs, scheme.source)
    console.print(table)


@app.command()
@with_choices
def plan(
    model: Model,
    scheme: SchemeName,
    targets: Targets = None,
    ignore: Ignore = None,
    out: Annotated[
        Path | None, typer.Option(help="Save the plan as JSON, for `tnlm compress --plan`.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    resources: Resources = False,
    jobs: Jobs = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Show what compress would do to every matrix, and the resulting cost."""
    choices = asked(given)
    read_plan(None, scheme, choices)
    check_jobs(jobs)
    if out is not None:
        check_file(out)
    if resources:
        check_nothing_runs(jobs=jobs, device=device, out=out)
        show_resources(
            model, scheme, as_json, targets=targets, ignore=ignore, dtype=dtype, **choices
        )
        return
    if needs_start(jobs):
        run_jobs(int(jobs or 1), main)
        return
    loaded, tokenizer = load_on(model, dtype, device)
    decided = tnlm.plan(
        loaded,
        scheme,
        targets=targets,
        ignore=ignore,
        workers=workers_here(),
        progress=not as_json and is_first(),
        **_with(tokenizer, choices),
    )
    if not is_first():
        return
    if out is not None:
        decided.save(out)
    if as_json:
        print_json(json.loads(decided.to_json()))
        return
    console.print(layers_table(decided.layers))
    console.print("\n".join([*decided.left(), *decided.summary()]), highlight=False, soft_wrap=True)


def _with(tokenizer: Any, choices: dict[str, Any]) -> dict[str, Any]:
    """Add the tokenizer to the choices if there is data to tokenize."""
    reads = {"calibration", "training"} & choices.keys()
    return {**choices, "tokenizer": tokenizer} if reads else choices


@app.command()
@with_choices
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Output directory, new or empty.")],
    scheme: Annotated[
        str | None, typer.Option("--scheme", "-s", help="A name from `tnlm schemes`.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Instead: a plan from `tnlm plan --out`.", **FILE)
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    memory: Memory = None,
    scratch: Scratch = None,
    device: Device = None,
    jobs: Jobs = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Compress a model and save it."""
    from tnlm.checkpoint.exchange import check_writable

    choices = asked(given)
    scheme_or_plan = read_plan(plan, scheme, choices)
    check_jobs(jobs)
    if needs_start(jobs):
        check_writable(out, overwrite=overwrite)
        run_jobs(int(jobs or 1), main)
        return
    if memory is not None or scratch is not None:
        choices |= {"targets": targets, "ignore": ignore, "dtype": dtype, "overwrite": overwrite}
        choices |= {"memory": memory, "scratch": scratch, "device": device, "progress": not as_json}
        done = compress_on_disk(model, out, scheme_or_plan, **choices)
        if is_first():
            print_report(done, as_json)
        return
    check_writable(out, overwrite=overwrite)
    loaded, tokenizer = load_on(model, dtype, device)
    tnlm.compress(
        loaded,
        scheme_or_plan,
        targets=targets,
        ignore=ignore,
        workers=workers_here(),
        progress=not as_json and is_first(),
        **_with(tokenizer, choices),
    )
    if not is_first():
        return
    tnlm.save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    print_report(tnlm.report(loaded), as_json)
    if not as_json:
        console.print(f"saved to {out}; load it with: import tnlm, then {_loader(loaded)}")


@app.command()
def info(
    directory: Annotated[Path, typer.Argument(help="A directory written by tnlm.")],
    as_json: Json = False,
) -> None:
    """Describe a compressed model from its files, without loading it."""
    from tnlm.checkpoint.describing import describe

    found = describe(directory)
    if as_json:
        print_json(found)
        return
    table = Table("", "", show_header=False)
    for key, value in found.items():
        shown = json.dumps(value) if isinstance(value, dict) else printable(value)
        table.add_row(key, f"{value:,}" if isinstance(value, int) else escape(shown))
    console.print(table)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A directory written by tnlm.")],
    as_json: Json = False,
) -> None:
    """Check every file of a compressed model against the checksum from when it was saved."""
    sums = tnlm.verify(directory)
    if as_json:
        print_json(sums)
        return
    console.print(f"{len(sums)} files match their checksums: {', '.join(sums)}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Output directory.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M-Instruct in four ways, and measure quality, size and speed."""
    from tnlm.cli.demo import run

    say: Callable[[Any], None] = (lambda _: None) if as_json else typer.echo
    result = run(out, say, progress=not as_json)
    if as_json:
        print_json(result)


def _loader(model: Any) -> str:
    """Return the class that loads a model like this one."""
    name = type(model).__name__
    return "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options of the called command, by keyword."""
    command = getattr(get_command(app), "commands", {}).get(words[0] if words else "")
    found = [] if command is None else command.params
    options = [each for each in found if each.param_type_name == "option"]
    return {each.name.rstrip("_"): each.opts[0] for each in options}  # type_ is --type


def main() -> None:
    """Run the command line; an error of tnlm is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # SIGTERM ends the process like Ctrl-C, so that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed = ""
    try:
        app()
    except TnlmError as error:
        message = in_options(error, _options(sys.argv[1:]))
        failed = f"{type(error).__name__}: {message}\n"
    if failed:  # after `except` the error is freed, so an open progress bar has ended its line
        sys.stderr.write(failed)
        sys.exit(1)
