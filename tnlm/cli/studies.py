"""Commands that study a model: its structure, quality, speed and compression."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import tnlm
from tnlm.cli.loading import load
from tnlm.cli.options import (
    FILE,
    FOLDER,
    Bos,
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
    SeedAsked,
    Targets,
)
from tnlm.cli.output import console, numbers, print_json, print_report
from tnlm.errors import OptionError
from tnlm.utils.files import check_file, save_text

studies = typer.Typer()

Out = Annotated[Path, typer.Argument(help="Output directory, new or empty.")]
Baseline = Annotated[str | None, typer.Option(help="Model to compare with.")]
Limit = Annotated[int | None, typer.Option(help="Maximum items per task.")]

OWN = ("model", "out", "baseline", "dtype", "overwrite", "as_json")
"""Parameters that a command handles itself; it passes the others to the public function."""


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in OWN}


def _load(model: str, baseline: str | None, dtype: str) -> tuple[Any, Any, Any]:
    """Return a model, its tokenizer, and its baseline if there is one."""
    loaded, tokenizer = load(model, dtype=dtype)
    return loaded, tokenizer, None if baseline is None else load(baseline, dtype=dtype)[0]


def _show(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(found.to_json()))
    else:
        console.print(str(found), highlight=False, soft_wrap=True, markup=False)


@studies.command()
def analyze(
    model: Model,
    out: Out,
    calibration: Calibration = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Format to try; may be repeated."),
    ] = None,
    baseline: Baseline = None,
    targets: Targets = None,
    ignore: Ignore = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    max_length: MaxLength = 512,
    bos: Bos = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show where a model can be compressed: spectra of its weights, and of its outputs on data."""
    asked = _arguments(locals()) | {"formats": tuple(formats or ())}
    asked["bos"] = "auto" if bos is None else bos
    from tnlm.checkpoint.exchange import check_writable

    if baseline is not None:
        _check_baseline(calibration)
    check_writable(out, overwrite=overwrite)
    loaded, tokenizer, dense = _load(model, baseline, dtype)
    asked |= {"tokenizer": tokenizer, "progress": not as_json}
    found = tnlm.analyze(loaded, **asked)
    before = None if dense is None else tnlm.analyze(dense, **asked)
    found.save(out, overwrite=overwrite)
    _draw(found, out, before, as_json)
    _show(found, as_json)


def _check_baseline(calibration: Any) -> None:
    """Raise `OptionError` unless the page of an analysis can show a baseline."""
    if calibration is None:
        raise OptionError("--baseline needs --calibration: only features on data are compared")
    if not _can_draw():
        raise OptionError("--baseline needs matplotlib, to draw both: pip install 'tnlm[plot]'")


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _draw(found: tnlm.Analysis, out: Path, before: tnlm.Analysis | None, as_json: bool) -> None:
    """Write the page of an analysis, if there is matplotlib."""
    if not _can_draw():
        sys.stderr.write("no page was written: plots need matplotlib: pip install 'tnlm[plot]'\n")
        return
    from tnlm.studies.page.analysis import FILE, write_analysis

    page = write_analysis(found, out / FILE, before=before)
    if not as_json:
        console.print(f"wrote {page}", highlight=False, soft_wrap=True)


@studies.command()
def evaluate(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text or JSONL file, for perplexity.", **FILE)
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks: piqa,arc_easy.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Directory of JSONL files; without it, lm-eval downloads.", **FOLDER),
    ] = None,
    baseline: Baseline = None,
    window: Annotated[int, typer.Option(help="Tokens per window of the text.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text.")] = 16,
    bos: Bos = None,
    limit: Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Few-shot examples per prompt.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Maximum tokens per prompt; by default, the model's context length."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed for few-shot examples and the bootstrap.")] = 1234,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, benchmarks, or both, optionally beside a baseline."""
    asked = _arguments(locals())
    from tnlm.evaluation.rows import rows_of
    from tnlm.evaluation.tasks import get_task

    if text is None and tasks is None:
        raise OptionError("nothing to measure; pass --text or --tasks")
    asked["tasks"] = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    for task in map(get_task, asked["tasks"]):
        if data is not None and task.config:
            rows_of(task, data)  # found missing or broken before the model is loaded
    asked["bos"] = "auto" if bos is None else bos
    if out is not None:
        check_file(out)
    loaded, tokenizer, beside = _load(model, baseline, dtype)
    if tokenizer is None:
        raise OptionError(f"{model} has no tokenizer, which an evaluation needs")
    found = tnlm.evaluate(
        loaded, tokenizer=tokenizer, baseline=beside, progress=not as_json, **asked
    )
    if out is not None:
        save_text(out, found.to_json())
    _show_evaluation(found, loaded, text, as_json)


def _show_evaluation(found: tnlm.Evaluation, model: Any, text: Path | None, as_json: bool) -> None:
    """Print an evaluation; a perplexity alone takes one line, or the JSON keys of its protocol."""
    if text is None:
        _show(found, as_json)
        return
    from tnlm.layers.packing import count_parameters

    count = count_parameters(model)
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
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths: 16,128.")] = "16,128",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(help="Repetitions per model.")] = 5,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure latency, memory, size on disk and energy, alternating with a baseline."""
    asked = _arguments(locals())
    asked["prompt_tokens"] = numbers("prompt-tokens", prompt_tokens) or []
    loaded, tokenizer, beside = _load(model, baseline, dtype)
    found = tnlm.efficiency(
        loaded, tokenizer=tokenizer, baseline=beside, progress=not as_json, **asked
    )
    _show(found, as_json)


@studies.command()
def rank_search(
    model: Model,
    out: Out,
    search: Annotated[Path, typer.Option(help="Text to choose the ranks on.", **FILE)],
    report: Annotated[Path, typer.Option(help="Other text, for the final perplexity.", **FILE)],
    calibration: Calibration = None,
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="A low-rank scheme.")] = "sfsd",
    growth: Annotated[
        float | None, typer.Option(help="Factor by which the perplexity may grow per matrix.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Instead of --growth: fraction of the model's parameters to keep."),
    ] = None,
    chunks: Annotated[
        int, typer.Option(help="Parts of the search text; a rank must be good enough on each.")
    ] = 1,
    candidates: Annotated[
        str | None,
        typer.Option(help="Ranks to try, as fractions of the break-even rank: 0.2,0.5."),
    ] = None,
    order: Annotated[str, typer.Option(help="Order of the matrices: reverse or forward.")] = (
        "reverse"
    ),
    num_samples: NumSamples = None,
    max_length: MaxLength = 512,
    cache_dir: CacheDir = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Keeps trials, so that the search can resume.")
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    seed: SeedAsked = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the rank of every matrix by trial, and save the compressed model."""
    asked = _arguments(locals())
    from tnlm.checkpoint.exchange import check_writable
    from tnlm.studies.rank_search import CANDIDATES

    check_writable(out, overwrite=overwrite)
    asked["candidates"] = numbers("candidates", candidates, float) or CANDIDATES
    loaded, tokenizer, _ = _load(model, None, dtype)
    found = tnlm.rank_search(
        loaded, "perplexity", tokenizer=tokenizer, progress=not as_json, **asked
    )
    tnlm.save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    _show(found, as_json)


@studies.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory written by tnlm.")],
    html: Annotated[
        Path | None, typer.Option("--html", "--out", help="Write one HTML page to this file.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="JSON from `tnlm evaluate --out`, shown on the page.", **FILE),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what compression did to every matrix, or write it as an HTML page with pictures."""
    if html is None and evaluation is None:
        print_report(tnlm.report(directory), as_json)
        return
    path = tnlm.write_page(directory, html, evaluation=evaluation)
    if as_json:
        print_json({"page": str(path)})
    else:
        console.print(f"wrote {path}", highlight=False)
