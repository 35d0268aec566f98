"""Reads columns of a table: sequences of ids, texts, pairs of texts, or conversations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from tnlm.calibration.files import file_meant, first_row, is_lines
from tnlm.calibration.inputs import main_input
from tnlm.calibration.pairs import pair_samples
from tnlm.calibration.sequences import Batch, samples_of
from tnlm.calibration.tables import Row, Table, is_parquet, is_streamed, open_table
from tnlm.calibration.text import AUTO, start_token, tokenize
from tnlm.calibration.windows import id_windows
from tnlm.errors import CalibrationError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Column = str | tuple[str, str] | None
"""The column of texts, or the two columns of an encoder's and a decoder's texts."""
MESSAGES = "messages"
"""The column of conversations: lists of ``{"role": ..., "content": ...}``."""


def check_column(column: Any) -> None:
    """Raise `OptionError` unless a column is a name, two names or None.

    Example:
        >>> check_column(("document", "summary"))
    """
    names = (column,) if isinstance(column, str) else column
    listed = isinstance(names, list | tuple) and 1 <= len(names) <= 2
    if column is not None and not (listed and all(isinstance(name, str) for name in names)):
        raise OptionError(
            f"column={column!r}; allowed: the name of a column of texts, or two of them, for pairs",
            argument="column",
        )


def tabular(data: Any, column: Column, main: str) -> Table | None:
    """Return data as a table, or None if it is text or contains sequences.

    Args:
        data: data of any kind.
        column: the user's choice of columns; if given, the data must be a table.
        main: the model's main input.

    Raises:
        OptionError: if a column is given, but the data has no columns.

    Example:
        >>> tabular([{"messages": []}], None, "input_ids").columns
        ['messages']
        >>> tabular([{"input_ids": [3]}], None, "input_ids") is None
        True
    """
    if column is None and _is_taken_whole(data, main):
        return None
    table = open_table(data)
    if table is None and column is not None:
        raise OptionError(
            f"column={column!r} is for rows with named columns; the data is a "
            f"{type(data).__name__} without any",
            argument=("column", "calibration"),
        )
    return table


def _is_taken_whole(data: Any, main: str) -> bool:
    """Return whether data is not read as a table, but by index or as one text."""
    if isinstance(data, str | os.PathLike):
        path = file_meant(data)
        if path is None or not is_lines(path):
            return path is None or not is_parquet(path)
        first = first_row(path)
        return "text" in first or not {main, MESSAGES} & first.keys()
    if isinstance(data, list | tuple):
        rows = [row for row in data if isinstance(row, Mapping)]
        return not rows or main in rows[0] or not {"text", MESSAGES} & rows[0].keys()
    if isinstance(data, Mapping) or not hasattr(data, "column_names") or is_streamed(data):
        return not is_streamed(data)
    columns = data.column_names or []
    return main in columns or "text" in columns or (len(data) > 0 and main in data[0])


def table_samples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
    bos: bool | str = AUTO,
    column: Column = None,
    model: PreTrainedModel | None = None,
) -> list[Batch]:
    """Return at most ``count`` samples from a table, reading no more rows than needed.

    Without ``column``, samples come from the model's main input, or else from ``text``, or else
    from ``messages``. Texts are tokenised row by row, each followed by a blank line, concatenated
    and cut into windows; so are conversations, formatted by the tokenizer's chat template.

    Raises:
        CalibrationError: if a column or value is missing, or a tokenizer or chat template is needed
            but missing.
    """
    names = _chosen(table, column, main_input(model))
    rows = _checked(table.rows(seed), names)
    if names == (main_input(model),):
        if bos is True:
            raise OptionError("bos=True is for text; token ids are not changed", argument="bos")
        found = (sample for row in rows for sample in samples_of(row, max_length, model))
        return list(islice(found, count))
    if tokenizer is None:
        raise CalibrationError(
            "calibration is text, which needs the model's tokenizer: tokenizer=",
            argument="tokenizer",
        )
    if len(names) == 2:
        pairs = [(_text(row, names[0]), _text(row, names[1])) for row in islice(rows, count)]
        return pair_samples(pairs, tokenizer, max_length, model)
    if names == (MESSAGES,):
        start = start_token(tokenizer, bos) if bos is True else None  # the template adds its own
        texts = (conversation(row[MESSAGES], tokenizer) for row in rows)
    else:
        start = start_token(tokenizer, bos)
        texts = (_text(row, names[0]) + "\n\n" for row in rows)
    return _windows(texts, tokenizer, max_length, count, start)


def conversation(messages: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as text, formatted by the tokenizer's chat template.

    Args:
        messages: ``{"role": ..., "content": ...}`` of every turn.
        tokenizer: a tokenizer with a chat template.

    Raises:
        CalibrationError: if there is no template, or it does not accept the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            "the data has 'messages', but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give texts"
        )
    listed = isinstance(messages, list | tuple) and len(messages) > 0
    if not listed or not all(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        raise CalibrationError(
            f"'messages' is {str(messages)[:80]!r}; give a list of {{'role': ..., 'content': ...}}"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as err:  # a template is a program, and may raise anything
        raise CalibrationError(
            f"the tokenizer's chat template does not accept the messages "
            f"{str(messages)[:80]!r}: {err}"
        ) from err


def _chosen(table: Table, column: Column, main: str) -> tuple[str, ...]:
    """Return the columns to read."""
    if column is None:
        known = (main, "text", MESSAGES)
        found = next((name for name in known if name in table.columns), None)
        if found is None:
            raise CalibrationError(
                f"the calibration data has the columns {list(table.columns)}; it needs {main!r}, "
                "'text' or 'messages', or the name of its column of texts: column=",
                argument="column",
            )
        return (found,)
    names = (column,) if isinstance(column, str) else tuple(column)
    for name in names:
        if name not in table.columns:
            raise CalibrationError(
                f"column={name!r}, but the calibration data has the columns {list(table.columns)}",
                argument="column",
            )
    return names


def _checked(rows: Iterator[Row], names: tuple[str, ...]) -> Iterator[Row]:
    """Yield rows, each of which must have the columns."""
    for row in rows:
        missing = [name for name in names if name not in row]
        if missing:
            raise CalibrationError(
                f"a row of the calibration data has no {missing[0]!r}, only {', '.join(row)}"
            )
        yield row


def _text(row: Row, name: str) -> str:
    text = row[name]
    if not isinstance(text, str):
        raise CalibrationError(
            f"column {name!r} holds a {type(text).__name__}, not a string; name a column of texts: "
            "column=",
            argument="column",
        )
    return text


def _windows(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    count: int,
    start: int | None,
) -> list[Batch]:
    """Cut concatenated texts into windows until there are enough."""
    length = max_length - (start is not None)
    if length < 1:
        raise OptionError(
            f"max_length={max_length} leaves no room after BOS; use at least 2",
            argument="max_length",
        )
    parts, tokens = [], 0
    for text in texts:
        parts.append(tokenize(text, tokenizer))
        tokens += len(parts[-1])
        if tokens >= count * length:
            break
    return id_windows(torch.cat(parts), length, start)[:count] if parts else []
