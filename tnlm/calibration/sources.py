"""Texts of any length: short texts are read whole, and of long texts only the parts used.

A long text is divided into chunks that start and end between paragraphs, or between lines of a
``.jsonl`` file, so that each has the same tokens alone as within the whole text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import Tensor

from tnlm.calibration.files import file_meant, is_lines, is_plain, json_row
from tnlm.calibration.text import read_text, text_field, tokenize
from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE = 2**24
"""Longest text that is tokenised at once, in bytes of a file or characters of a string."""
CHUNK = 2**16
"""Length of a chunk in bytes or characters, unless windows are longer."""
TOKEN = 16
"""Upper bound on the bytes or characters per token, except for texts that are barely text."""
_ENDS = rb"\n[ \t\r]*\n", rb"\n", rb"\s"
"""Ends of chunks, in order of preference: after a paragraph, a line, or a word."""


class Source(Protocol):
    """A text that can be read in parts."""

    size: int

    def part(self, start: int, stop: int) -> str:
        """Return the paragraphs that start in a range of positions."""


class Memory:
    r"""A text in memory, with positions in characters.

    Example:
        >>> text = Memory("one paragraph\n\nanother one\n\nthe last")
        >>> text.part(0, 3), text.part(20, text.size)
        ('one paragraph\n\n', 'the last')
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.size = len(text)

    def part(self, start: int, stop: int) -> str:
        """See `Source`."""
        return self._text[self._edge(start) : self._edge(stop)]

    def _edge(self, at: int) -> int:
        if at <= 0 or at >= self.size:
            return max(0, min(at, self.size))
        near = self._text[at - 1 : at + CHUNK]
        return at - 1 + _after(near, [kind.decode() for kind in _ENDS], at + CHUNK >= self.size)


class File:
    """A text file in UTF-8, with positions in bytes.

    Args:
        path: the file's path.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, is_lines(path)
        self.size = path.stat().st_size
        self._long: list[tuple[int, int]] = []

    def part(self, start: int, stop: int) -> str:
        """See `Source`; for a ``.jsonl`` file, the texts of the lines that start in the range."""
        with self._path.open("rb") as file:
            start, stop = self._edge(file, start), self._edge(file, stop)
            file.seek(start)
            data = file.read(stop - start)
        try:
            text = data.decode()
        except UnicodeDecodeError as err:
            raise CalibrationError(
                f"{self._path}: not a readable UTF-8 text file: at byte {start + err.start}: {err}"
            ) from err
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return self._texts(text, start) if self._lines else text

    def _texts(self, text: str, start: int) -> str:
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            return "\n\n".join(text_field(json_row(line, "?"), "?") for line in lines)
        except CalibrationError:  # count the preceding lines only for an error
            first = self._line(start)
            for number, line in enumerate(text.split("\n"), start=first):
                if line.strip():
                    text_field(json_row(line, f"{self._path}:{number}"), f"{self._path}:{number}")
            raise

    def _line(self, place: int) -> int:
        """Return the number of the line that starts at a byte."""
        count = 1
        with self._path.open("rb") as file:
            while place > 0 and (data := file.read(min(place, 2**20))):
                count, place = count + data.count(b"\n"), place - len(data)
        return count

    def _edge(self, file: BinaryIO, at: int) -> int:
        if at <= 0 or at >= self.size:
            return max(0, min(at, self.size))
        file.seek(at - 1)
        if self._lines:
            return self._line_end(file, at - 1)
        return at - 1 + _after(file.read(CHUNK + 1), _ENDS, at + CHUNK >= self.size)

    def _line_end(self, file: BinaryIO, at: int) -> int:
        """Return the end of the line at a position; in long lines, it is searched only once."""
        for start, end in self._long:
            if start <= at < end:
                return end
        end = at + len(file.readline())
        if end - at > CHUNK:
            self._long.append((at, end))
        return end


def _after(near: Any, kinds: Sequence[Any], last: bool) -> int:
    """Return the start of the next paragraph, or else line, word or character.

    In the last part of a text without another paragraph, it is the end of the text.
    """
    for kind in kinds:
        if found := re.search(kind, near):
            return int(found.end())
        if last:
            return len(near)
    if isinstance(near, str):
        return 1
    whole = (n for n in range(1, len(near)) if near[n] & 0xC0 != 0x80)  # the start of a character
    return next(whole, len(near))


def open_source(data: str | os.PathLike[str] | Sequence[str]) -> Source:
    """Open a text, a named file, or texts joined by blank lines.

    Raises:
        CalibrationError: if a named file does not exist, or cannot be read.

    Example:
        >>> open_source(["a text", "another"]).size
        15
    """
    if not isinstance(data, str | os.PathLike):
        return Memory("\n\n".join(data))
    path = file_meant(data)
    if path is None:
        return Memory(str(data))
    try:
        if path.stat().st_size > WHOLE and is_plain(path):
            return File(path)
    except OSError as err:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file: {err}") from err
    return Memory(read_text(path))


def is_long(data: Any) -> bool:
    """Return whether data is a text or a text file of which only chunks are tokenised.

    Example:
        >>> is_long(["a text"]), is_long([1, 2])
        (False, False)
    """
    if isinstance(data, list | tuple):
        return sum(len(text) + 2 for text in data if isinstance(text, str)) > WHOLE
    return isinstance(data, str | os.PathLike) and open_source(data).size > WHOLE


def first_ids(source: Source, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """Return at most ``count`` first ids of a text, reading little more than needed.

    They equal those of the whole text: ever longer starts are tokenised until the ids do not
    change.
    """
    size, before = max(CHUNK, TOKEN // 2 * count), None
    while True:
        ids = tokenize(source.part(0, size), tokenizer)[:count]
        if size >= source.size or (
            before is not None and len(before) == count and bool((before == ids).all())
        ):
            return ids
        size, before = 2 * size, ids if len(ids) == count else None


def drawn_windows(
    source: Source, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[Tensor]:
    """Return at most ``count`` full windows ``(length,)`` of a long text, in the text's order.

    Chunks are drawn without replacement, and from each as few windows as needed; other chunks are
    not read.

    Args:
        source: the text.
        tokenizer: the model's tokenizer.
        length: tokens per window.
        count: number of windows.
        seed: seed of the sample.
    """
    step = max(CHUNK, TOKEN * length)
    starts = range(0, source.size, step)
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[int, int, Tensor]] = []
    order = torch.randperm(len(starts), generator=generator).tolist()
    left: dict[int, list[int]] = {}
    while order and len(found) < count:  # repeat if long lines left most chunks empty
        for done, chunk in enumerate(order):
            if len(found) >= count:
                break
            ids = tokenize(source.part(starts[chunk], starts[chunk] + step), tokenizer)
            windows = ids[: len(ids) // length * length].reshape(-1, length)
            if chunk not in left:
                left[chunk] = torch.randperm(len(windows), generator=generator).tolist()
            wanted = -(-(count - len(found)) // (len(order) - done))
            drawn, left[chunk] = left[chunk][:wanted], left[chunk][wanted:]
            found += [(chunk, number, windows[number].clone()) for number in drawn]
        order = [chunk for chunk in order if left.get(chunk)]
    return [window for _, _, window in sorted(found, key=lambda each: each[:2])]
