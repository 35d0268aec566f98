"""The contract of a runtime: what it executes, and how a model is written for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prepared:
    """A model that was checked and converted, and only has to be written.

    Attributes:
        bytes: of its weights on disk.
        write: fills an empty directory.
    """

    bytes: int
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Runtime:
    """A program that runs models without tnlm.

    Attributes:
        name: what users write as ``portable=``.
        title: one line for tables.
        to: the kind of file it reads, which users write as ``to=``.
        types: data types of the weights in its files, the default first; ``"model"`` keeps the
            model's own.
        formats: structures that it executes; anything else is multiplied out on export.
        multiple: the widths of narrowed layers are multiples of this.
        prepare: takes the model, its tokenizer or None, and a type. Raises `ModelError` for a model
            that the runtime cannot execute.
        allocation: how the budget must be shared out; None for any way.
    """

    name: str
    title: str
    to: str
    types: tuple[str, ...]
    formats: tuple[str, ...]
    multiple: int
    prepare: Callable[[PreTrainedModel, Any, str], Prepared]
    allocation: str | None = None
