"""The interface of recoveries, which train a compressed model after fitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 200_000
"""Tokens that a training takes by default."""


@dataclass(frozen=True)
class Practice:
    """The data and settings of a recovery.

    Attributes:
        lessons: sequences and how to read them, from `tnlm.recovery.recover.as_lessons`.
        teacher: the dense model, for recoveries that need it.
        dense: the original weights by layer name, for recoveries that need them.
        preset: the losses by which student and teacher are compared.
        tokenizer: for masked language models.
        seed: seed of the order of the data.
        progress: show a progress bar.
    """

    lessons: Mapping[str, Any]
    teacher: PreTrainedModel | None = None
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    preset: str | None = None
    tokenizer: Any = None
    seed: int = 0
    progress: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Arguments common to all training functions."""
        shared = {"tokenizer": self.tokenizer, "seed": self.seed, "progress": self.progress}
        return {**self.lessons, **shared}


@dataclass(frozen=True)
class RecoveryKind:
    """A way to train only the compressed layers of a model.

    Attributes:
        name: the name that users write as ``recover=``.
        title: one line for tables.
        run: trains the model in place.
        needs_teacher: whether it needs a copy of the dense model.
        needs_dense: whether it needs the original weights.
        adapts: whether it trains adapters of compressed linear layers, and nothing else.
        tokens: how many tokens it trains on by default.
    """

    name: str
    title: str
    run: Callable[[PreTrainedModel, Practice], Any]
    needs_teacher: bool = False
    needs_dense: bool = False
    adapts: bool = False
    tokens: int = TOKENS
