"""Quality of schemes at several sizes: one table of perplexities against dense, resumable.

    python benchmarks/quality.py MODEL OUT --calibration train.txt --text wiki=test.txt \
        --text c4=c4.jsonl --scheme svd-llm auto --keep-targets 0.9 0.8 0.6

Every run is a process of its own, so that its peak memory is its own. Results are appended to
OUT/results.jsonl as they come; runs that are there already are not repeated. OUT/quality.md is the
table. Calibration statistics are kept in OUT/cache. A scheme may carry options after a colon:
``svd-llm:allocation=loss,damping=0.01``; runs that differ in ``seed=`` alone, which draws the
calibration data, are one row of ``--table readme``, as a mean with its spread and range.
``--seeds 0 1 2`` measures every scheme that looks at data with each of these draws. ``--together``
saves the time to start processes, for small models, and leaves out the peak memory.
``auto:scale_tokens=2048`` and ``auto:generations=10`` are level searches on the text ``--search``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SEARCH = {"generations", "scale_tokens"}
"""Options of a level search."""
DESTROYED = 100.0
"""Ratio of perplexities from which a model is of no use."""


def main(words: list[str] | None = None) -> list[Row]:
    """Run what is missing, write the table of all results, and return the rows asked for.

    Args:
        words: of the command line; those that the script was started with if None.
    """
    words = sys.argv[1:] if words is None else words
    asked = _arguments(words)
    if asked.single:
        print(json.dumps(_measure(asked, asked.scheme[0], asked.keep_targets[0])))
        return []
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "results.jsonl"
    done = _read(results)
    schemes = [drawn for scheme in asked.scheme for drawn in _draws(scheme, asked.seeds or [])]
    jobs = [("dense", 1.0)] + [(s, k) for k in asked.keep_targets for s in schemes]
    for scheme, keep in jobs:
        if any((row["scheme"], row["asked"]) == (scheme, keep) for row in done):
            continue
        print(f"{scheme} at {keep:g} ...", file=sys.stderr, flush=True)
        row = _attempt(asked, scheme, keep) if asked.together else _run(words, scheme, keep)
        done.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    (asked.out / "quality.md").write_text(_table(done))
    (asked.out / "quality.json").write_text(json.dumps(done, indent=1) + "\n")
    print(_readme(done, asked.model) if asked.table == "readme" else _table(done))
    found = {(row["scheme"], row["asked"]): row for row in done}
    return [found[job] for job in jobs]


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", nargs="+", required=True)
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--search", type=Path, help="text of level searches")
    parser.add_argument("--seeds", type=int, nargs="+", help="draws of the calibration data")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--gradient-samples", type=int, default=16)
    parser.add_argument("--table", choices=["whole", "readme"], default="whole")
    parser.add_argument("--together", action="store_true", help="all in this process")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _run(words: list[str], scheme: str, keep: float) -> Row:
    """Run one measurement in a process of its own; a failure becomes a row that says so."""
    one = ["--single", "--scheme", scheme, "--keep-targets", str(keep)]
    done = subprocess.run(
        [sys.executable, __file__, *words, *one], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row
    return {"scheme": scheme, "asked": keep, "error": done.stderr.strip().splitlines()[-1]}


def _attempt(asked: argparse.Namespace, scheme: str, keep: float) -> Row:
    """Run one measurement in this process; a failure becomes the row that `_run` makes of it."""
    from tnlm.errors import TnlmError

    try:
        return _measure(asked, scheme, keep)
    except TnlmError as error:
        last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        return {"scheme": scheme, "asked": keep, "error": last}


def _measure(asked: argparse.Namespace, named: str, keep: float) -> Row:
    import tnlm
    from tnlm.checkpoint.dense_models import load_model

    model, tokenizer = load_model(asked.model)
    row: Row = {"scheme": named, "asked": keep}
    start = time.perf_counter()
    if named != "dense":
        name, options = _parted(named)
        keywords: dict[str, Any] = {"keep_targets": keep, "progress": False, **options}
        if _looks_at_data(name, keywords):
            keywords |= {"calibration": asked.calibration, "tokenizer": tokenizer}
            keywords |= {"cache_dir": asked.out / "cache", "num_samples": asked.num_samples}
            keywords |= {"gradient_samples": asked.gradient_samples, "max_length": asked.window}
        if SEARCH & keywords.keys():
            keywords |= {"search": asked.search, "output_dir": asked.out / f"{named} {keep:g}"}
            keywords |= {"generations": keywords.get("generations", 0)}
            found = tnlm.level_search(model, name, **keywords)
            row["search"] = json.loads(found.to_json())
            del row["search"]["plan"]
        else:
            tnlm.compress(model, name, **keywords)
        plan = tnlm.report(model).plan
        row["keep_targets"] = plan.targets_after.params / plan.targets_before.params
        row["keep_macs"] = plan.targets_after.macs / plan.targets_before.macs
        row["seconds"] = dict(tnlm.report(model).seconds)
    row["total_seconds"] = time.perf_counter() - start
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if not asked.together:
        # Kibibytes on Linux; the statistics' cache decides whether calibration passes are in it.
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    for text in asked.text:
        label, _, path = text.partition("=")
        measured = tnlm.perplexity(
            model, Path(path), tokenizer, window=asked.window, windows=asked.windows
        )
        row[label] = measured.perplexity
    return row


def _parted(named: str) -> tuple[str, dict[str, Any]]:
    """Return a scheme's name and its options.

    >>> _parted("svd-llm:allocation=loss,damping=0.01")
    ('svd-llm', {'allocation': 'loss', 'damping': 0.01})
    """
    name, _, options = named.partition(":")
    return name, dict(_option(part) for part in options.split(",") if part)


def _option(part: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _looks_at_data(scheme: str, keywords: dict[str, Any]) -> bool:
    from tnlm.compression.request import make_request

    choices = {k: keywords[k] for k in ("metric", "allocation", "cascade") if k in keywords}
    return make_request(scheme, **choices).looks_at_data


def _table(rows: list[Row]) -> str:
    """Return a Markdown table; perplexities with their ratio to dense."""
    dense = next(row for row in rows if row["scheme"] == "dense")
    texts = _texts(dense)
    head = ["scheme", "asked", *texts, "targets", "MACs", "parameters", "whole model"]
    head += ["fit s", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "error" in row:
            cells = [row["scheme"], f"{row['asked']:g}", row["error"]]
            lines.append("| " + " | ".join(cells) + " |" + " |" * (len(head) - 3))
            continue
        cells = [row["scheme"], f"{row['asked']:g}"]
        cells += [f"{row[t]:.2f} ({row[t] / dense[t]:.3f})" for t in texts]
        cells += [f"{row[k]:.3f}" if k in row else "1" for k in ("keep_targets", "keep_macs")]
        cells += [f"{row['parameters']:,}", f"{row['parameters'] / dense['parameters']:.3f}"]
        seconds = row.get("seconds", {})
        fit = seconds.get("plan", 0.0) + seconds.get("fit", 0.0)
        cells += [f"{fit:.0f}", str(row.get("peak_mib", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _texts(dense: Row) -> list[str]:
    """Return the names of the texts, from the row of the dense model."""
    fixed = {"scheme", "asked", "keep_targets", "keep_macs", "seconds", "total_seconds"}
    return [key for key in dense if key not in fixed | {"parameters", "peak_mib"}]


def _readme(rows: list[Row], model: str) -> str:
    """Return a short Markdown table, below the model's name and its perplexities."""
    dense = next(row for row in rows if row["scheme"] == "dense")
    of = ", ".join(f"{dense[text]:.1f} on {text}" for text in _texts(dense))
    return f"{Path(model).name}; perplexity of the dense model: {of}.\n\n{ratios(rows)}"


def ratios(rows: list[Row]) -> str:
    """Return a Markdown table of ratios to dense alone, over all draws of the data.

    A size at which a scheme failed, in any draw, stands as failed.
    """
    dense = next(row for row in rows if row["scheme"] == "dense")
    texts = _texts(dense)
    lines = [
        "| | linear weights kept | " + " | ".join(texts) + " |",
        "|" + "---|" * (2 + len(texts)),
    ]
    draws: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["scheme"] != "dense":
            draws.setdefault((_drawn(row["scheme"]), row["asked"]), []).append(row)
    for (scheme, keep), alike in draws.items():
        failed = any("error" in row for row in alike)
        cells = ["failed"] * len(texts)
        if not failed:
            cells = [_spread([row[text] / dense[text] for row in alike]) for text in texts]
        lines.append(f"| `{scheme}` | {keep:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _draws(scheme: str, seeds: list[int]) -> list[str]:
    """Return a scheme with each seed as its option; as it is without seeds, or if none matters.

    >>> _draws("auto", [1, 2]), _draws("svd-llm:damping=0.1", [2])
    (['auto:seed=1', 'auto:seed=2'], ['svd-llm:damping=0.1,seed=2'])
    >>> _draws("auto", []), _draws("svd", [1, 2])
    (['auto'], ['svd'])
    """
    if not seeds or not _looks_at_data(*_parted(scheme)):
        return [scheme]
    return [f"{scheme}{',' if ':' in scheme else ':'}seed={seed}" for seed in seeds]


def _drawn(scheme: str) -> str:
    """Return a scheme's name and options without the seed."""
    name, _, options = scheme.partition(":")
    left = [part for part in options.split(",") if part and not part.startswith("seed=")]
    return ":".join([name, ",".join(left)] if left else [name])


def _spread(ratios: list[float]) -> str:
    """Return a mean, with standard deviation and range if there are several; in words if large.

    >>> _spread([1.1]), _spread([1.1, 1.3]), _spread([200.0])
    ('1.100', '1.200 ± 0.141 (1.100 to 1.300)', 'destroyed')
    """
    mean = statistics.fmean(ratios)
    if mean >= DESTROYED:
        return "destroyed"
    if len(ratios) == 1:
        return f"{mean:.3f}"
    around = f"({min(ratios):.3f} to {max(ratios):.3f})"
    return f"{mean:.3f} ± {statistics.stdev(ratios):.3f} {around}"


if __name__ == "__main__":
    main()
