"""The published Tucker study at rank 1, on a model of another depth; resumable.

    python benchmarks/tucker_study.py MODEL OUT --data DIR [--limit 100] [--rank 1]
        [--tasks arc_easy arc_challenge hellaswag mmlu truthfulqa_mc1 winogrande]

Each of the ten schedules of layers that Moar et al. 2024 (arXiv 2405.06626) measured on Llama-2-7B
is moved to the model's depth; all matrices of those layers are decomposed, nothing is retrained,
and accuracies are set beside the dense model's. DIR holds the tasks' JSONL files. A fine-tuned
classifier, such as that of `classifier.py`, takes ``--tasks sst2`` (DIR/sst2_dev.jsonl). Every
accuracy goes to OUT/<task>-<limit>.jsonl as soon as it is there; the same command goes on after a
stop, and measures only what is missing. OUT/tucker_study.md is the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import classification
from timing import table, write
from transformers import PreTrainedModel

import tnlm
from tnlm import Configuration, DesignSpace
from tnlm.checkpoint.dense_models import load_model
from tnlm.errors import EvaluationError
from tnlm.evaluation.mode import evaluating
from tnlm.studies.design import PUBLISHED_PERCENT, Sweep
from tnlm.studies.design.series import published
from tnlm.studies.scores import ModelScore

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc1", "winogrande")
SST2 = "sst2"
"""The task of a classifier: rows of ``sentence`` and ``label``."""

Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table."""
    asked = _arguments()
    model, tokenizer = load_model(asked.model)
    measure = partial(accuracy, tokenizer=tokenizer, data=asked.data, limit=asked.limit)
    scores = {task: partial(measure, task=task) for task in asked.tasks}
    rows = study(model, scores, asked.out, rank=asked.rank, limit=asked.limit)
    results = {"model": Path(asked.model).name, "limit": asked.limit, "rank": asked.rank}
    write(asked.out, "tucker_study", {**results, "rows": rows}, as_text(rows, asked.limit))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    return parser.parse_args()


def accuracy(model: PreTrainedModel, *, task: str, tokenizer: Any, data: Path, limit: int) -> float:
    """Return a model's accuracy on the first items of one task."""
    if task == SST2:
        rows = tnlm.labelled(data / "sst2_dev.jsonl", tokenizer, text="sentence")[:limit]
        _check_items(task, data, len(rows), limit)
        with evaluating(model):
            return classification.accuracy(model, rows, tokenizer.pad_token_id)
    found = tnlm.evaluate(model, [task], tokenizer=tokenizer, data=data, limit=limit)[task]
    _check_items(task, data, found.n, limit)
    return float(found["acc"].value)


def _check_items(task: str, data: Path, found: int, limit: int) -> None:
    if found < limit:
        raise EvaluationError(f"{task} has {found} items in {data}; --limit asks for {limit}")


def study(
    model: PreTrainedModel, scores: Mapping[str, ModelScore], out: Path, *, rank: int, limit: int
) -> list[Row]:
    """Measure every score under every schedule, and dense.

    Args:
        model: left unchanged.
        scores: task to what measures its accuracy.
        out: folder of the journals, one for each task, so that nothing finished is done again.
        rank: of every matrix.
        limit: items of a task; stands in the journals' names.
    """
    space = DesignSpace(model, ranks=[rank])
    wanted = list(published(space))
    sweeps = {
        task: tnlm.sweep(model, space, score, wanted, journal=out / f"{task}-{limit}.jsonl")
        for task, score in scores.items()
    }
    return [_row(space, sweeps, configuration) for configuration in [Configuration(), *wanted]]


def _row(space: DesignSpace, sweeps: Mapping[str, Sweep], configuration: Configuration) -> Row:
    found: Row = {
        "layers": list(configuration.layers),
        "percent": space.percent(configuration),
        "published_percent": space.percent(configuration, "published"),
        "accuracy": {},
        "drop": {},
        "failed": {},
    }
    for task, swept in sweeps.items():
        trial = next(
            t for t in (swept.dense, *swept.trials) if t.configuration.key == configuration.key
        )
        if trial.error is not None:
            found["failed"][task] = trial.error
            continue
        found["accuracy"][task] = trial.values["value"]
        found["drop"][task] = 0.0 - swept.changes(trial)["value"]  # no -0.0
    return found


def as_text(rows: Sequence[Row], limit: int) -> str:
    """Return the table: percentages removed, and accuracies with their drops in points."""
    tasks = list(rows[0]["accuracy"])
    head = ["Llama-2-7B", "removed", "as published", *tasks, "mean drop", "layers"]
    said = ["dense", *(f"{percent:.1f} %" for percent in PUBLISHED_PERCENT)]
    lines = []
    for of, row in zip(said, rows, strict=True):
        percents = [f"{row[name]:.2f} %" for name in ("percent", "published_percent")]
        cells = [_cell(row, task) for task in tasks]
        lines.append([of, *percents, *cells, _mean(row), ranges(row["layers"]) or "none"])
    error = 100 * (0.25 / max(limit - 1, 1)) ** 0.5
    return (
        f"{table(head, lines)}\n\nAccuracy (drop) in points, {limit} items a task: the standard "
        f"error of one accuracy is at most {error:.1f} points. Nothing is retrained."
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short.

    Example:
        >>> ranges([1, 3, 4, 5, 6, 8, 9])
        '1 3-6 8 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def _cell(row: Row, task: str) -> str:
    if task in row["failed"]:
        return "failed"
    return f"{100 * row['accuracy'][task]:.1f} ({100 * row['drop'][task]:+.1f})"


def _mean(row: Row) -> str:
    drops = list(row["drop"].values())
    return f"{100 * sum(drops) / len(drops):+.1f}" if drops else "failed"


if __name__ == "__main__":
    main()
