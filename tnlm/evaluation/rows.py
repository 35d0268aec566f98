"""Rows of benchmarks from local files, and the items that are made of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tnlm.calibration.files import read_lines
from tnlm.errors import CalibrationError, EvaluationError
from tnlm.evaluation.tasks.base import Item, Row, Task

Source = str | Path | Sequence[Row]
Data = str | Path | Mapping[str, Source]

_SPLITS = ("", "_test", "_val", "_validation", "_dev", "_subset")
_EXAMPLES = ("_train", "_dev")
_TEXTS = ("perplexity.txt", "perplexity.jsonl", "wiki.test.raw")


def rows_of(task: Task, data: Data, limit: int | None = None) -> list[Row]:
    """Return the first rows of a task, adapted to the columns that it reads.

    Args:
        task: whose rows.
        data: a directory, where the file is named after the task, e.g. ``arc_easy_test.jsonl``;
            or a file or rows for each task's name.
        limit: how many; shared evenly by the parts of a task that must be balanced.

    Raises:
        EvaluationError: naming the file and line, or the item, that cannot be used.
    """
    source = _source(task, data)
    rows = adapted(task, source if not isinstance(source, str | Path) else _read(Path(source)))
    return rows if limit is None else first_of_each(rows, task.balance, limit)


def first_of_each(rows: Sequence[Row], column: str, limit: int) -> list[Row]:
    """Return the first rows of each value of a column, in turns, in the order of the rows.

    Example:
        >>> rows = [{"set": "pro"}, {"set": "pro"}, {"set": "anti"}]
        >>> [row["set"] for row in first_of_each(rows, "set", 2)]
        ['pro', 'anti']
    """
    if not column:
        return list(rows[:limit])
    seen: Counter[str] = Counter()
    turns = []
    for number, row in enumerate(rows):
        turns.append((seen[row[column]], number))
        seen[row[column]] += 1
    return [rows[number] for number in sorted(number for _, number in sorted(turns)[:limit])]


def example_rows(task: Task, data: Data, examples: Mapping[str, Source] | None) -> list[Row] | None:
    """Return the rows that few-shot examples are drawn from, or None if there are none.

    Args:
        task: whose rows.
        data: as in :func:`rows_of`; a directory may hold ``<task>_train.jsonl`` or
            ``<task>_dev.jsonl``.
        examples: a file or rows for each task's name, used before ``data``.
    """
    source: Source | None = (examples or {}).get(task.name)
    if source is None and isinstance(data, str | Path):
        used, stem = _source(task, data), task.file or task.name
        names = [Path(data) / f"{stem}{split}.jsonl" for split in _EXAMPLES]
        source = next((name for name in names if name.is_file() and name != used), None)
    if source is None:
        return None
    return adapted(task, source if not isinstance(source, str | Path) else _read(Path(source)))


def adapted(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Bring rows to the columns that the task reads; errors name the item, counted from 0."""
    found: list[Row] = []
    for number, row in enumerate(rows):
        where = f"{task.name} item {number}"
        if not isinstance(row, Mapping):
            raise EvaluationError(f"{where}: a row must map columns to values, got {row!r}")
        try:
            found.append(task.adapt(row))
        except KeyError as err:
            raise EvaluationError(
                f"{where}: no column {err}; its columns are {', '.join(map(str, row))}"
            ) from err
        except EvaluationError as err:
            raise EvaluationError(f"{where}: {err}") from err
        except (TypeError, ValueError) as err:
            raise EvaluationError(f"{where}: a column has the wrong type: {err}") from err
    if not found:
        raise EvaluationError(f"{task.name}: no rows")
    return found


def with_examples(
    task: Task, items: Sequence[Item], pool: Sequence[Item] | None, shots: int, seed: int
) -> list[Item]:
    """Put the task's description and ``shots`` solved items before each item.

    Args:
        task: says how examples are drawn: at random for each item, or the first of its group.
        items: to be asked.
        pool: solved items; needed if ``shots`` is not 0.
        shots: examples before each item.
        seed: of the draws; with the same rows and seed lm-eval draws the same.
    """
    if shots and pool is None:
        raise EvaluationError(
            f"{task.name}: num_fewshot={shots}, but there are no rows to draw examples from; give "
            f"examples={{{task.name!r}: ...}}, a file {task.file or task.name}_train.jsonl, or "
            "num_fewshot=0"
        )
    draws = random.Random(seed)
    found = []
    for number, item in enumerate(items):
        shown = _draw(task, item, pool or (), shots, draws, number)
        before = item.description + "".join(f"{each.shot}\n\n" for each in shown)
        found.append(replace(item, pairs=tuple((before + c, text) for c, text in item.pairs)))
    return found


def _draw(
    task: Task, item: Item, pool: Sequence[Item], shots: int, draws: random.Random, number: int
) -> Sequence[Item]:
    """Draw the examples of one item."""
    if not shots:
        return ()
    fit = [each for each in pool if not task.split_by or each.group == item.group]
    if len(fit) < shots:
        of = f" of {item.group}" if item.group else ""
        raise EvaluationError(
            f"{task.name} item {number}: num_fewshot={shots}, but there are {len(fit)} examples{of}"
        )
    return fit[:shots] if task.sampler == "first" else draws.sample(fit, shots)


def text_source(task: Task, data: Data) -> str | Path | list[str]:
    """Return the text, the texts or the path of the text, of a task that measures a whole text."""
    source = _source(task, data)
    if isinstance(source, str | Path):
        return source
    given: Sequence[Any] = source
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise EvaluationError(f"{task.name} needs a text or the path of one, got {type(source)}")
    return texts


def _source(task: Task, data: Data) -> Source:
    """Find what a task reads: an entry of the mapping, or a file of the directory."""
    if isinstance(data, Mapping):
        if task.name not in data:
            raise EvaluationError(
                f"data has no entry {task.name!r}; it has {', '.join(map(str, data)) or 'none'}"
            )
        return data[task.name]
    folder, stem = Path(data), task.file or task.name
    if not folder.is_dir():
        raise EvaluationError(f"data={str(data)!r} is no directory")
    files = _TEXTS if task.kind == "text" else [f"{stem}{split}.jsonl" for split in _SPLITS]
    for name in files:
        if (folder / name).is_file():
            return folder / name
    raise EvaluationError(f"{task.name}: {folder} holds none of {', '.join(files)}")


def _read(path: Path) -> list[Row]:
    """Read the rows of a JSONL file."""
    try:
        rows: list[Row] = [row for _, row in read_lines(path)]
    except CalibrationError as err:
        raise EvaluationError(str(err)) from err
    return rows
