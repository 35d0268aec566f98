"""Rows with named columns: lists of dicts, ``.jsonl`` and parquet files, datasets, streams.

Rows are read in random order, and only as many as the samples need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnlm.calibration.files import file_meant, is_lines, read_lines
from tnlm.errors import CalibrationError

BUFFER = 1000
"""Size of the buffer of a stream's rows, from which rows are drawn one at a time."""
PARQUET = ".parquet"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        columns: names of the columns.
        rows: yields the rows in random order, from a seed.
        streamed: whether rows come one after another, without access by index.
    """

    columns: Sequence[str]
    rows: Callable[[int], Iterator[Row]]
    streamed: bool = False


def open_table(data: Any) -> Table | None:
    """Open data that has rows with named columns; return None for other data.

    Raises:
        CalibrationError: if a file cannot be read.

    Example:
        >>> table = open_table([{"text": "one"}, {"text": "two"}])
        >>> table.columns, sorted(row["text"] for row in table.rows(0))
        (['text'], ['one', 'two'])
    """
    if isinstance(data, str | os.PathLike):
        path = file_meant(data)
        if path is not None and is_parquet(path):
            return _parquet(path)
        return _listed([row for _, row in read_lines(path)]) if path and is_lines(path) else None
    if isinstance(data, list | tuple):
        rows = bool(data) and all(isinstance(row, Mapping) for row in data)
        return _listed(data) if rows else None
    if is_streamed(data):
        return _streamed(data)
    if isinstance(data, Mapping) or not hasattr(data, "column_names"):
        return None
    return Table(data.column_names or [], lambda seed: _looked_up(data, seed))


def is_streamed(data: Any) -> bool:
    """Return whether data is a stream of ``datasets``, whose rows come one after another.

    Example:
        >>> is_streamed([{"text": "one"}])
        False
    """
    named = hasattr(data, "column_names") and not isinstance(data, Mapping)
    return named and not hasattr(data, "__len__")


def is_parquet(path: Path) -> bool:
    """Return whether a file is a parquet table, judging by its name."""
    return path.suffix.lower() == PARQUET


def _listed(rows: Sequence[Row]) -> Table:
    return Table(list(rows[0]) if rows else [], lambda seed: _looked_up(rows, seed))


def _looked_up(rows: Any, seed: int) -> Iterator[Row]:
    """Yield rows in random order, reading each only when needed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return (rows[index] for index in order.tolist())


def _streamed(data: Any) -> Table:
    """Return a stream with a shuffle buffer; its columns are those of its first row."""
    columns = data.column_names or list(next(iter(data), {}))
    return Table(columns, lambda seed: iter(data.shuffle(seed=seed, buffer_size=BUFFER)), True)


def _parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as err:
        raise CalibrationError(
            f"{path}: reading parquet needs pyarrow, which is not installed: pip install "
            "'tnlm[data]'"
        ) from err
    try:
        table = read_table(path, memory_map=True)
    except (OSError, ArrowException) as err:
        raise CalibrationError(f"{path}: not a readable parquet file: {err}") from err

    def rows(seed: int) -> Iterator[Row]:
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        return (table.slice(index, 1).to_pylist()[0] for index in order.tolist())

    return Table(table.column_names, rows)
