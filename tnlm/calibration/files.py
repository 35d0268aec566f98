"""Reads files of text and of JSON rows, in several encodings."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tnlm.errors import CalibrationError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its prefix
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
_LINES = (".jsonl", ".ndjson")
_NAME, _PATH = 255, 4096
"""Longest file name and longest path, in characters."""
_READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error)


def file_meant(source: str | os.PathLike[str]) -> Path | None:
    """Return the file that a string or path names, or None if the string is itself a text.

    A path always names a file. So does a string that names an existing file or looks like a file
    name: a single line, not too long for a name, that has no spaces, starts like a path, or ends
    with a suffix. Everything else is a text.

    Raises:
        CalibrationError: if the file does not exist.

    Example:
        >>> file_meant("Once upon a time there was a text.") is None
        True
        >>> file_meant("misspelt.txt")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: 'misspelt.txt' is not an existing file: ...
    """
    name = os.fspath(source)
    try:
        path = Path(source)
        if path.is_file():
            return path
        what = _other_than_file(path) if name and path.exists() else "no such file"
    except (OSError, ValueError):  # too long for the system, or with a null character
        what = "no such file"
    if isinstance(source, str) and what == "no such file" and not _is_name(name):
        return None
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    raise CalibrationError(
        f"{shown!r} is not an existing file: {what}; to give a text, put it in a list: [text]"
    )


def _other_than_file(path: Path) -> str:
    """Return what is at the path instead of a file."""
    if path.is_dir():
        return "it is a directory"
    return "it is a pipe or a device, which cannot be read twice; write it to a file first"


def _is_name(text: str) -> bool:
    """Return whether a string that names no file was probably meant as a file name."""
    parts = re.split(r"[/\\]", text)
    if not text.strip() or "\n" in text or len(text) > _PATH or max(map(len, parts)) > _NAME:
        return False
    begins = re.match(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]", text)
    ends = re.search(r"\w\.[A-Za-z]\w{0,7}$", text)
    return bool(begins or ends or not re.search(r"\s", text))


def is_lines(path: Path) -> bool:
    """Return whether a file has one JSON object per line, judging by its name.

    Example:
        >>> is_lines(Path("a.JSONL")), is_lines(Path("a.jsonl.gz")), is_lines(Path("a.json"))
        (True, True, False)
    """
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(_LINES)


def is_plain(path: Path) -> bool:
    """Return whether a file is uncompressed UTF-8, judging by its first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    return not head.startswith((_GZIP, *(mark for mark, _ in _MARKS)))


def open_text(path: str | os.PathLike[str]) -> TextIO:
    """Open a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; possibly gzipped."""
    path = Path(path)
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    stream: Any = gzip.GzipFile(path) if packed else io.FileIO(path)
    buffered = io.BufferedReader(stream)
    head = buffered.peek(4)
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    return io.TextIOWrapper(buffered, encoding=encoding)


def read_file(path: str | os.PathLike[str]) -> str:
    """Return the whole text of a file.

    Raises:
        CalibrationError: if the file cannot be read, or is not text.

    Example:
        >>> read_file("no such file.txt")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: no such file.txt: no such file; ...
    """
    try:
        with open_text(path) as file:
            text = file.read()
    except FileNotFoundError as err:
        raise CalibrationError(
            f"{path}: no such file; give an existing text or .jsonl file"
        ) from err
    except _READ_ERRORS as err:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file: {err}") from err
    if "\0" in text[:4096]:
        raise CalibrationError(
            f"{path}: not a readable UTF-8 text file: it has null characters, like binary "
            "files, or UTF-16 without a byte order mark"
        )
    return text


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a ``.jsonl`` file, each with its location; empty lines are skipped.

    Raises:
        CalibrationError: if the file cannot be read, or a line is not a JSON object.
    """
    # Not splitlines(): JSON strings may contain U+2028 and other characters at which it splits.
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", json_row(line, f"{path}:{number}")


def first_row(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the first object of a ``.jsonl`` file, reading little more; empty if there is none.

    Raises:
        CalibrationError: if the file cannot be read, or its first line is not a JSON object.
    """
    try:
        with open_text(path) as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            number, line = next(lines, (1, "{}"))
    except _READ_ERRORS as err:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file: {err}") from err
    return json_row(line, f"{path}:{number}")


def json_row(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object on a line; errors name its location."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise CalibrationError(f"{where}: not valid JSON: {err}") from err
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: not a JSON object; give one with named columns, such as 'text'"
        )
    return row
