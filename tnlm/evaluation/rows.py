"""Rows of benchmarks from local files, checked and converted to the columns that tasks read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnlm.calibration.files import read_lines
from tnlm.errors import CalibrationError, EvaluationError
from tnlm.evaluation.tasks.base import Row, Task

Source = str | Path | Sequence[Row]
"""The source of a task's rows: a file, or the rows themselves."""
Sources = str | Path | Mapping[str, Source]
"""A directory with a file per task, or a source for each task's name."""

_SPLITS = ("", "_test", "_val", "_validation", "_dev", "_subset")
_EXAMPLES = ("_train", "_dev")
_TEXTS = ("perplexity.txt", "perplexity.jsonl", "wiki.test.raw")


def rows_of(task: Task, data: Sources, limit: int | None = None) -> list[Row]:
    """Return the first rows of a task, converted to the columns that it reads.

    Args:
        task: the task.
        data: a directory with a file named after the task, e.g. ``arc_easy_test.jsonl``; or a file
            or rows for each task's name.
        limit: number of rows, split evenly between the parts of a task that must be balanced.

    Raises:
        EvaluationError: if a row cannot be used; names the file and line, or the item.
    """
    rows = adapted(task, _content(_source(task, data)))
    return rows if limit is None else first_of_each(rows, task.balance, limit)


def first_of_each(rows: Sequence[Row], column: str, limit: int) -> list[Row]:
    """Return the first rows of each value of a column, taken in turns, in their original order.

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


def example_rows(
    task: Task,
    rows: Sequence[Row],
    shots: int,
    data: Sources,
    examples: Mapping[str, Source] | None,
) -> list[Row]:
    """Return the rows from which few-shot examples are drawn.

    Args:
        task: the task.
        rows: the items; each part of the task among them needs ``shots`` examples.
        shots: examples for each item.
        data: as in :func:`rows_of`; a directory may have ``<task>_train.jsonl`` or
            ``<task>_dev.jsonl``.
        examples: a file or rows for each task's name, preferred to ``data``.

    Raises:
        EvaluationError: if there are no such rows, or too few.
    """
    source = _example_source(task, data, examples) if shots else ()
    if source is None:
        raise EvaluationError(
            f"{task.name}: num_fewshot={shots}, but there are no rows to draw examples from; give "
            f"examples={{{task.name!r}: ...}}, a file {task.file or task.name}_train.jsonl, or "
            "num_fewshot=0",
            argument="num_fewshot",
        )
    pool = adapted(task, _content(source)) if shots else []
    counts = Counter(row.get(task.split_by, "") for row in pool)
    for number, row in enumerate(rows):
        part = row.get(task.split_by, "")
        if counts[part] < shots:
            raise EvaluationError(
                f"{task.name} item {number}: num_fewshot={shots}, but there are {counts[part]} "
                f"examples{f' of {part}' if part else ''}",
                argument="num_fewshot",
            )
    return pool


def _example_source(
    task: Task, data: Sources, examples: Mapping[str, Source] | None
) -> Source | None:
    """Return the source of examples, or None if there is none besides the items themselves."""
    if task.name in (examples or {}):
        return (examples or {})[task.name]
    if not isinstance(data, str | Path):
        return None
    used, stem = _source(task, data), task.file or task.name
    names = [Path(data) / f"{stem}{split}.jsonl" for split in _EXAMPLES]
    return next((name for name in names if name.is_file() and name != used), None)


def adapted(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Convert rows to the columns that the task reads; errors name the item, counted from 0."""
    found: list[Row] = []
    for number, row in enumerate(rows):
        where = f"{task.name} item {number}"
        if not isinstance(row, Mapping):
            raise EvaluationError(f"{where}: a row must map columns to values, got {row!r}")
        try:
            found.append(task.adapt(row))
            json.dumps(found[-1], ensure_ascii=False).encode()  # rejects unpaired surrogates
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


def text_source(task: Task, data: Sources) -> str | Path | list[str]:
    """Return the text, the texts or the path for a task that measures a whole text."""
    source = _source(task, data)
    if isinstance(source, str | Path):
        return source
    given: Sequence[Any] = source
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise EvaluationError(f"{task.name} needs a text or the path of one, got {type(source)}")
    return texts


def _source(task: Task, data: Sources) -> Source:
    """Return the source of a task: an entry of the mapping, or a file in the directory."""
    if isinstance(data, Mapping):
        if task.name not in data:
            raise EvaluationError(
                f"data has no entry {task.name!r}; it has {', '.join(map(str, data)) or 'none'}"
            )
        return data[task.name]
    folder, stem = Path(data), task.file or task.name
    if not folder.is_dir():
        raise EvaluationError(f"data={str(data)!r} is not a directory", argument="data")
    files = _TEXTS if not task.config else [f"{stem}{split}.jsonl" for split in _SPLITS]
    for name in files:
        if (folder / name).is_file():
            return folder / name
    raise EvaluationError(f"{task.name}: {folder} has none of {', '.join(files)}")


def _content(source: Source) -> Sequence[Row]:
    """Return given rows, or read them from a file."""
    return _read(Path(source)) if isinstance(source, str | Path) else source


def _read(path: Path) -> list[Row]:
    """Read the rows of a JSONL file."""
    try:
        rows: list[Row] = [row for _, row in read_lines(path)]
    except CalibrationError as err:
        raise EvaluationError(str(err), argument=err.arguments) from err
    return rows
