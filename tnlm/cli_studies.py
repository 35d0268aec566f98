"""Commands that study a model: its structure, its quality, its speed, and what was done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import tnlm
from tnlm.cli_options import (
    FILE,
    FOLDER,
    CacheDir,
    Calibration,
    Dtype,
    Ignore,
    Json,
    MaxLength,
    Model,
    NumSamples,
    Overwrite,
    Seed,
    Targets,
)
from tnlm.cli_output import console, numbers, print_json
from tnlm.errors import OptionError

studies = typer.Typer()

Baseline = Annotated[str | None, typer.Option(help="A model to measure beside it.")]


def _show(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(found.to_json()))
    else:
        console.print(str(found), highlight=False, soft_wrap=True, markup=False)


@studies.command()
def analyze(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The directory to write; new or empty.")],
    calibration: Calibration = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="A format whose error curve is wanted.")
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    num_samples: Annotated[int, typer.Option(help="Windows of calibration data.")] = 16,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show where a model is compressible: spectra of its weights, and of its features on data."""
    from tnlm.integrations.models import load_model
    from tnlm.saving import check_writable

    check_writable(out, overwrite=overwrite)
    loaded, tokenizer = load_model(model, dtype=dtype)
    found = tnlm.analyze(
        loaded,
        calibration,
        tokenizer=tokenizer,
        targets=targets,
        ignore=ignore,
        formats=tuple(formats or ()),
        num_samples=num_samples,
        max_length=max_length,
        seed=seed,
        progress=not as_json,
    )
    found.save(out, overwrite=overwrite)
    _show(found, as_json)


@studies.command()
def evaluate(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text or JSONL file, for perplexity.", **FILE)
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of benchmarks: piqa,arc_easy.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of JSONL files with the benchmarks' rows; else lm-eval fetches them.",
            **FOLDER,
        ),
    ] = None,
    baseline: Baseline = None,
    window: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows, from the start of the text.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Items of a benchmark, at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before an item.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a question, at most; the model's positions if not given."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Draws the examples and the bootstraps.")] = 1234,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, or benchmarks, or both; beside a baseline if there is one."""
    from tnlm.evaluation.tasks import get_task
    from tnlm.integrations.models import load_model

    if text is None and tasks is None:
        raise OptionError("nothing to measure; pass --text or --tasks")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    for name in names:
        get_task(name)
    if out is not None and not out.parent.is_dir():
        raise OptionError(f"--out {out}: no such directory as {out.parent}")
    loaded, tokenizer = load_model(model, dtype=dtype)
    if tokenizer is None:
        raise OptionError(f"{model} has no tokenizer, which an evaluation needs")
    beside = None if baseline is None else load_model(baseline, dtype=dtype)[0]
    found = tnlm.evaluate(
        loaded,
        names,
        tokenizer=tokenizer,
        text=text,
        data=data,
        baseline=beside,
        window=window,
        windows=windows,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        seed=seed,
        progress=not as_json,
    )
    if out is not None:
        out.write_text(found.to_json(), encoding="utf-8")
    _show_evaluation(found, loaded, text, as_json)


def _show_evaluation(found: tnlm.Evaluation, model: Any, text: Path | None, as_json: bool) -> None:
    """Print an evaluation; a perplexity alone is one line, or the keys that say its protocol."""
    if text is None:
        _show(found, as_json)
        return
    count = sum(p.numel() for p in model.parameters())
    alone = len(found.results) == 1 and found.results[0].figures[0].baseline is None
    if not as_json:
        shown = f"{found.perplexity if alone else found}, {count:,} parameters"
        console.print(shown, highlight=False, soft_wrap=True, markup=False)
        return
    left_out = ("results", "scorer", "seed") if alone else ()
    values = {key: value for key, value in found.to_dict().items() if key not in left_out}
    print_json({**values, "parameters": count, "text": text.name})


@studies.command()
def efficiency(
    model: Model,
    baseline: Baseline = None,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts: 16,128.")] = "16,128",
    new_tokens: Annotated[int, typer.Option(help="Tokens that are decoded.")] = 32,
    repeats: Annotated[int, typer.Option(help="Turns of each model.")] = 5,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure latency, memory, bytes on disk and energy, in turns with a baseline."""
    from tnlm.integrations.models import load_model

    lengths = numbers("prompt-tokens", prompt_tokens) or []
    loaded, tokenizer = load_model(model, dtype=dtype)
    beside = None if baseline is None else load_model(baseline, dtype=dtype)[0]
    found = tnlm.efficiency(
        loaded,
        tokenizer=tokenizer,
        prompt_tokens=lengths,
        new_tokens=new_tokens,
        repeats=repeats,
        baseline=beside,
        progress=not as_json,
    )
    _show(found, as_json)


@studies.command()
def surgical(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The directory to write; new or empty.")],
    search: Annotated[Path, typer.Option(help="Text that decides.", **FILE)],
    report: Annotated[Path, typer.Option(help="Other text, for the figures in the end.", **FILE)],
    calibration: Calibration = None,
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="A low-rank scheme.")] = "sfsd",
    growth: Annotated[
        float | None, typer.Option(help="Perplexity may grow by this factor at each matrix.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the model's parameters, instead.")
    ] = None,
    chunks: Annotated[
        int, typer.Option(help="Parts of SEARCH; a rank must do on each of them.")
    ] = 1,
    candidates: Annotated[
        str | None, typer.Option(help="Ranks tried, as parts of the neutral one: 0.2,0.5,0.8.")
    ] = None,
    order: Annotated[str, typer.Option(help="reverse or forward.")] = "reverse",
    num_samples: NumSamples = 64,
    max_length: MaxLength = 512,
    cache_dir: CacheDir = None,
    run_dir: Annotated[Path | None, typer.Option(help="Keeps trials, to go on from.")] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the rank of every matrix by trial, and save the model."""
    from tnlm.integrations.models import load_model
    from tnlm.saving import check_writable
    from tnlm.surgical.ladder import CANDIDATES

    check_writable(out, overwrite=overwrite)
    parts = numbers("candidates", candidates, float)
    loaded, tokenizer = load_model(model, dtype=dtype)
    found = tnlm.surgical_search(
        loaded,
        "perplexity",
        search=search,
        report=report,
        scheme=scheme,
        targets=targets,
        ignore=ignore,
        growth=growth,
        keep=keep,
        chunks=chunks,
        candidates=CANDIDATES if parts is None else parts,
        order=order,
        calibration=calibration,
        tokenizer=tokenizer,
        num_samples=num_samples,
        max_length=max_length,
        cache_dir=cache_dir,
        output_dir=run_dir,
        seed=seed,
        progress=not as_json,
    )
    tnlm.save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    _show(found, as_json)


@studies.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A directory written by tnlm.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; DIRECTORY/report.html if not given.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="JSON of `tnlm evaluate --out`, shown beside.", **FILE)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page about a compressed model."""
    path = tnlm.write_page(directory, out, evaluation=evaluation)
    if as_json:
        print_json({"page": str(path)})
    else:
        console.print(f"wrote {path}", highlight=False)
