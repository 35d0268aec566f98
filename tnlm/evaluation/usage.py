"""The time, memory, disk space and energy that a model takes, beside a baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tnlm.evaluation.results import aligned
from tnlm.utils.notebook import fragment


@dataclass(frozen=True)
class Spread:
    """A median, with the minimum and maximum over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values.

        Example:
            >>> Spread.of([3.0, 1.0, 2.0])
            Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """Times at one prompt length.

    Attributes:
        prompt_tokens: the prompt length.
        prefill: seconds for the pass over the prompt, the time to the first token.
        decode: seconds per token after that.
        joules: energy for the prompt and the new tokens; None if no counter can be read.
    """

    prompt_tokens: int
    prefill: Spread
    decode: Spread
    joules: float | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """New tokens per second."""
        return 1 / self.decode.median


@dataclass(frozen=True)
class Usage:
    """The resources that one model takes.

    Attributes:
        parameters: number of parameters, shared ones counted once.
        weights: bytes of parameters and buffers in memory.
        working: peak growth of memory, in bytes, while running the longest prompt; None if the
            system does not report it.
        disk: bytes of its files.
        timings: one for each prompt length.
    """

    parameters: int
    weights: int
    working: int | None
    disk: int
    timings: tuple[Timing, ...]

    @property
    def peak(self) -> int | None:
        """Bytes of weights plus working memory."""
        return None if self.working is None else self.weights + self.working


@dataclass(frozen=True)
class Efficiency:
    """Time, memory, disk space and energy, with the protocol of their measurement.

    Attributes:
        model: usage of the model.
        baseline: usage of the baseline, measured in alternation with the model.
        new_tokens: tokens decoded in each repeat.
        repeats: number of repeats in each median.
        device: where the models ran.
        threads: number of CPU threads used by torch.
        resident: resident bytes of the process after the measurement; None if unknown.
    """

    model: Usage
    baseline: Usage | None
    new_tokens: int
    repeats: int
    device: str
    threads: int
    resident: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        """Return a table, with figures of the baseline and ratios if there is one."""
        return "\n".join([*aligned(self._rows()), self._protocol()])

    def __repr__(self) -> str:
        """Return what was measured, in one line."""
        beside = "" if self.baseline is None else " beside a baseline"
        return f"<Efficiency{beside}: {self._protocol()}>"

    def _repr_html_(self) -> str:
        """Return the table, for a notebook."""
        return fragment("Efficiency", [self._protocol()], self._rows())

    def _rows(self) -> list[list[str]]:
        ours = _figures(self.model)
        theirs = {} if self.baseline is None else _figures(self.baseline)
        rows = [["figure", "model", *(["baseline", "ratio"] if theirs else [])]]
        for name, value in ours.items():
            cells = [name, _shown(value)]
            if theirs:
                other = theirs[name]
                ratio = f"{value / other:.3f}" if value is not None and other else ""
                cells += [_shown(other), ratio]
            rows.append(cells)
        return rows

    def _protocol(self) -> str:
        return (
            f"batch 1, {self.new_tokens} new tokens, medians of {self.repeats} repeats, "
            f"{self.device}, {self.threads} threads"
        )


def _figures(usage: Usage) -> dict[str, float | None]:
    """Return the figures of a model by name, in the table's units."""
    found: dict[str, float | None] = {"parameters": usage.parameters}
    sizes = {"weights": usage.weights, "peak": usage.peak, "disk": usage.disk}
    for name, size in sizes.items():
        found[f"{name} MiB"] = None if size is None else size / 2**20
    for timing in usage.timings:
        at = f"at {timing.prompt_tokens}"
        found[f"prefill {at}, ms"] = timing.prefill.median * 1e3
        found[f"prefill {at}, tokens/s"] = timing.prefill_rate
        found[f"decode {at}, ms/token"] = timing.decode.median * 1e3
        found[f"decode {at}, tokens/s"] = timing.decode_rate
        found[f"energy {at}, J"] = timing.joules
    return found


def _shown(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
