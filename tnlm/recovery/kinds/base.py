"""The contract of a recovery: how a compressed model is trained after it was fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Practice:
    """What a model is trained on, and with.

    Attributes:
        lessons: sequences and how they are read, as `tnlm.recovery.recover.as_lessons` gives them.
        teacher: the dense model, for a recovery that needs it.
        dense: weights that were fitted, by the name of the layer, for a recovery that needs them.
        preset: what a student and its teacher are compared by.
        tokenizer: for masked language models.
        seed: of the order of the data.
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
        """Arguments that all training functions take."""
        shared = {"tokenizer": self.tokenizer, "seed": self.seed, "progress": self.progress}
        return {**self.lessons, **shared}


@dataclass(frozen=True)
class RecoveryKind:
    """A way to train what tnlm made of a model, and nothing else of it.

    Attributes:
        name: what users write as ``recover=``.
        title: one line for tables.
        run: trains the model in place.
        needs_teacher: whether it learns from a copy of the dense model.
        needs_dense: whether it needs the weights that were fitted.
    """

    name: str
    title: str
    run: Callable[[PreTrainedModel, Practice], Any]
    needs_teacher: bool = False
    needs_dense: bool = False
