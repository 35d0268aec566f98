"""What a model takes in time, memory, disk and energy, beside a baseline."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tnlm.evaluation.results import aligned


@dataclass(frozen=True)
class Spread:
    """A median with the least and the most of its repeats."""

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
    """Times at one length of the prompt.

    Attributes:
        prompt_tokens: the length.
        prefill: seconds of the pass over the prompt, which is the wait for the first token.
        decode: seconds of a token after that.
        joules: of prompt and new tokens together; None where no counter may be read.
    """

    prompt_tokens: int
    prefill: Spread
    decode: Spread
    joules: float | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill.median

    @property
    def decode_rate(self) -> float:
        """New tokens a second."""
        return 1 / self.decode.median


@dataclass(frozen=True)
class Usage:
    """What one model takes.

    Attributes:
        parameters: shared ones counted once.
        weights: bytes of parameters and buffers in memory.
        working: bytes that memory grew by, at most, while it ran the longest prompt; None where
            the system does not say.
        disk: bytes of its files.
        timings: one for each length of the prompt.
    """

    parameters: int
    weights: int
    working: int | None
    disk: int
    timings: tuple[Timing, ...]

    @property
    def peak(self) -> int | None:
        """Bytes of weights and working memory together."""
        return None if self.working is None else self.weights + self.working


@dataclass(frozen=True)
class Efficiency:
    """Time, memory, disk and energy, with how they were measured.

    Attributes:
        model: what the model takes.
        baseline: what the baseline takes, measured in turn with it.
        new_tokens: steps decoded in each repeat.
        repeats: turns that each median is over.
        device: where the models ran.
        threads: that torch used on the CPU.
        resident: bytes of the whole process after the measurement; None where unknown.
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
        """Return a table, with the baseline's figures and ratios where there is one."""
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
        protocol = (
            f"batch 1, {self.new_tokens} new tokens, medians of {self.repeats} turns, "
            f"{self.device}, {self.threads} threads"
        )
        return "\n".join([*aligned(rows), protocol])


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
        found[f"decode {at}, ms a token"] = timing.decode.median * 1e3
        found[f"decode {at}, tokens/s"] = timing.decode_rate
        found[f"energy {at}, J"] = timing.joules
    return found


def _shown(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
