"""The command line: every command is one public function, and takes ``--json``."""

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
from tnlm.cli.options import (
    AllocationName,
    Blocks,
    Bos,
    CacheDir,
    Calibration,
    Cascade,
    Damping,
    Dtype,
    Gauge,
    GradientSamples,
    Ignore,
    InSplit,
    Json,
    Keep,
    KeepTargets,
    MaxLengthAsked,
    MaxMacs,
    MetricName,
    Model,
    NumSamples,
    OutSplit,
    Overwrite,
    Rank,
    Ranks,
    Recover,
    RecoverTokens,
    Refine,
    Ridge,
    SchemeName,
    SeedAsked,
    Share,
    Sweeps,
    Targets,
    Terms,
    Tolerance,
    Training,
    Unit,
    Width,
)
from tnlm.cli.output import console, layers_table, numbers, print_json, printable
from tnlm.cli.studies import studies
from tnlm.cli.words import in_options
from tnlm.errors import TnlmError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress language models with tensor networks and low-rank structure.",
)
app.add_typer(studies)


OPTIONS = ("terms", "rank", "width", "gauge", "ridge", "sweeps")
CHOICES = ("metric", "allocation", "cascade", "damping", "refine", "share")
RECOVERY = ("recover", "recover_tokens")
BUDGET = ("keep", "keep_targets", "tolerance", "max_macs", "unit", "blocks")
CUT = ("num_samples", "max_length", "bos", "gradient_samples", "seed")
DATA = ("targets", "ignore", "calibration", "training", "cache_dir", *CUT)


def _asked(values: dict[str, Any]) -> dict[str, Any]:
    """Return a command's options as arguments of `tnlm.compress`, checked before a model loads."""
    from tnlm.calibration.cache import check_cache
    from tnlm.compression.request import make_request

    if values["cache_dir"] is not None:
        check_cache(values["cache_dir"])
    options = {name: values[name] for name in OPTIONS}
    for name in ("ranks", "out_split", "in_split"):
        options[name] = numbers(name.replace("_", "-"), values[name])
    budget = {name: values[name] for name in (*CHOICES, *RECOVERY, *BUDGET)}
    make_request(values["scheme"], **budget, options=options)
    data = {name: values[name] for name in DATA}
    return {"scheme": values["scheme"], **budget, **data, **options}


def _reading(asked: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer as an argument, if there is data for it to read."""
    given = asked["calibration"] is not None or asked["training"] is not None
    return {"tokenizer": tokenizer} if given else {}


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
def plan(
    model: Model,
    scheme: SchemeName,
    terms: Terms = None,
    rank: Rank = None,
    ranks: Ranks = None,
    width: Width = None,
    out_split: OutSplit = None,
    in_split: InSplit = None,
    gauge: Gauge = None,
    ridge: Ridge = None,
    sweeps: Sweeps = None,
    keep: Keep = None,
    keep_targets: KeepTargets = None,
    tolerance: Tolerance = None,
    max_macs: MaxMacs = 1.0,
    metric: MetricName = None,
    allocation: AllocationName = None,
    cascade: Cascade = None,
    damping: Damping = None,
    refine: Refine = 0,
    share: Share = None,
    unit: Unit = "params",
    blocks: Blocks = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    max_length: MaxLengthAsked = None,
    bos: Bos = None,
    gradient_samples: GradientSamples = None,
    cache_dir: CacheDir = None,
    targets: Targets = None,
    ignore: Ignore = None,
    seed: SeedAsked = None,
    dtype: Dtype = "auto",
    recover: Recover = None,
    recover_tokens: RecoverTokens = None,
    training: Training = None,
    as_json: Json = False,
) -> None:
    """Print what compress would do to every matrix, and what it would cost."""
    asked = _asked(locals())
    from tnlm.checkpoint.dense_models import load_model

    loaded, tokenizer = load_model(model, dtype=dtype)
    decided = tnlm.plan(loaded, **_reading(asked, tokenizer), progress=not as_json, **asked)
    if as_json:
        print_json(json.loads(decided.to_json()))
        return
    console.print(layers_table(decided.layers))
    console.print("\n".join(decided.summary()), highlight=False, soft_wrap=True)


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The directory to write; new or empty.")],
    scheme: SchemeName,
    terms: Terms = None,
    rank: Rank = None,
    ranks: Ranks = None,
    width: Width = None,
    out_split: OutSplit = None,
    in_split: InSplit = None,
    gauge: Gauge = None,
    ridge: Ridge = None,
    sweeps: Sweeps = None,
    keep: Keep = None,
    keep_targets: KeepTargets = None,
    tolerance: Tolerance = None,
    max_macs: MaxMacs = 1.0,
    metric: MetricName = None,
    allocation: AllocationName = None,
    cascade: Cascade = None,
    damping: Damping = None,
    refine: Refine = 0,
    share: Share = None,
    unit: Unit = "params",
    blocks: Blocks = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    max_length: MaxLengthAsked = None,
    bos: Bos = None,
    gradient_samples: GradientSamples = None,
    cache_dir: CacheDir = None,
    targets: Targets = None,
    ignore: Ignore = None,
    seed: SeedAsked = None,
    dtype: Dtype = "auto",
    recover: Recover = None,
    recover_tokens: RecoverTokens = None,
    training: Training = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a model and save it."""
    asked = _asked(locals())
    from tnlm.checkpoint.dense_models import load_model
    from tnlm.checkpoint.exchange import check_writable

    check_writable(out, overwrite=overwrite)
    loaded, tokenizer = load_model(model, dtype=dtype)
    tnlm.compress(loaded, **_reading(asked, tokenizer), progress=not as_json, **asked)
    tnlm.save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    report = tnlm.report(loaded)
    if as_json:
        print_json(report.to_dict())
        return
    console.print(layers_table(report.plan.layers))
    console.print("\n".join(report.summary()), highlight=False, soft_wrap=True)
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
    """Compare every file of a compressed model with the sum taken when it was saved."""
    sums = tnlm.verify(directory)
    if as_json:
        print_json(sums)
        return
    console.print(f"{len(sums)} files are as they were saved: {', '.join(sums)}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="The directory to write.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Compress the real SmolLM2-135M-Instruct and measure what it cost and bought."""
    from tnlm.cli.demo import run

    say: Callable[[Any], None] = (lambda _: None) if as_json else console.print
    result = run(out, say)
    if as_json:
        print_json(result)


def _loader(model: Any) -> str:
    """Return the class that reads a model like this one."""
    name = type(model).__name__
    return "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options of the command that is called, by the keywords for which they stand."""
    command = getattr(get_command(app), "commands", {}).get(words[0] if words else "")
    found = [] if command is None else command.params
    return {each.name: each.opts[0] for each in found if each.param_type_name == "option"}


def main() -> None:
    """Run the command line; an error of tnlm is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Terminated, it ends as after Ctrl-C, and leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed = ""
    try:
        app()
    except TnlmError as error:
        told = in_options(str(error), _options(sys.argv[1:]), sys.argv[1:])
        failed = f"{type(error).__name__}: {told}\n"
    if failed:  # what the error held is gone here, so that an open progress bar has ended its line
        sys.stderr.write(failed)
        sys.exit(1)
