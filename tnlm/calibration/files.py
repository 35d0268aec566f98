"""Files of text and of rows: which one is meant, how it is encoded, what stands on its lines."""

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
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
_LINES = (".jsonl", ".ndjson")
_NAME, _PATH = 255, 4096
"""Most characters of a file's name and of a path."""
_READ_ERRORS = (OSError, EOFError, UnicodeError, zlib.error)


def file_meant(source: str | os.PathLike[str]) -> Path | None:
    """Return the file that a string or path names, or None if the string is a text itself.

    A path is always a file. So is a string that names an existing one, or that reads as a name: one
    line without spaces, or one that begins as a path or ends in a suffix, and is no longer than
    names are. All else is a text.

    Raises:
        CalibrationError: if no file has the name.

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
    except (OSError, ValueError):  # longer than the system lets a name be, or with a null
        what = "no such file"
    if isinstance(source, str) and what == "no such file" and not _is_name(name):
        return None
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    raise CalibrationError(
        f"{shown!r} is not an existing file: {what}; to give a text, put it in a list: [text]"
    )


def _other_than_file(path: Path) -> str:
    """Return what stands where a file is wanted."""
    if path.is_dir():
        return "it is a directory"
    return "it is a pipe or a device, which cannot be read twice; write it to a file first"


def _is_name(text: str) -> bool:
    """Whether a string that names no file was probably meant to."""
    parts = re.split(r"[/\\]", text)
    if not text.strip() or "\n" in text or len(text) > _PATH or max(map(len, parts)) > _NAME:
        return False
    begins = re.match(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]", text)
    ends = re.search(r"\w\.[A-Za-z]\w{0,7}$", text)
    return bool(begins or ends or not re.search(r"\s", text))


def is_lines(path: Path) -> bool:
    """Whether a file holds one JSON object a line, by its name.

    Example:
        >>> is_lines(Path("a.JSONL")), is_lines(Path("a.jsonl.gz")), is_lines(Path("a.json"))
        (True, True, False)
    """
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(_LINES)


def is_plain(path: Path) -> bool:
    """Whether a file is neither packed nor in another encoding than UTF-8, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    return not head.startswith((_GZIP, *(mark for mark, _ in _MARKS)))


def open_text(path: str | os.PathLike[str]) -> TextIO:
    """Open a text in UTF-8, or in UTF-16 or UTF-32 if it begins with their mark; maybe gzipped."""
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
        CalibrationError: for a file that cannot be read, or holds no text.

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
            f"{path}: not a readable UTF-8 text file: it holds null characters, as files of other "
            "kinds do, and UTF-16 without its mark"
        )
    return text


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a ``.jsonl`` file, each with its place; empty lines are passed over.

    Raises:
        CalibrationError: for a file that cannot be read, or a line that is no JSON object.
    """
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it breaks at.
    for number, line in enumerate(read_file(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", json_row(line, f"{path}:{number}")


def first_row(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the first object of a ``.jsonl`` file, and read little more; empty if there is none.

    Raises:
        CalibrationError: for a file that cannot be read, or a line that is no JSON object.
    """
    try:
        with open_text(path) as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            number, line = next(lines, (1, "{}"))
    except _READ_ERRORS as err:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file: {err}") from err
    return json_row(line, f"{path}:{number}")


def json_row(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object that a line holds; errors name the place."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise CalibrationError(f"{where}: not valid JSON: {err}") from err
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: no JSON object; give one with named columns, as 'text'")
    return row
