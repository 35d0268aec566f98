"""The protocol of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from tnlm.calibration.text import AUTO
from tnlm.errors import OptionError
from tnlm.evaluation.tasks import Task


@dataclass(frozen=True)
class Protocol:
    """The protocol of an evaluation: arguments of `tnlm.evaluate` of the same names, checked.

    Example:
        >>> Protocol(limit=0)
        Traceback (most recent call last):
        tnlm.errors.OptionError: limit=0, but at least 1 is needed
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int = 256
    window: int = 512
    windows: int = 16
    bos: bool | str = AUTO
    seed: int = 1234
    progress: bool = True

    def __post_init__(self) -> None:
        """Raise `OptionError` for counts that are too small."""
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1, "max_length": 2}
        for name, count in {**least, "max_new_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < count:
                raise OptionError(f"{name}={value}, but at least {count} is needed", argument=name)

    def shots_of(self, task: Task) -> int:
        """Return the number of few-shot examples for each item of a task."""
        return task.num_fewshot if self.num_fewshot is None else self.num_fewshot
