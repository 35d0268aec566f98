"""Results of an evaluation: figures with standard errors, beside those of a baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tnlm.errors import EvaluationError, did_you_mean
from tnlm.evaluation.flips import Flips
from tnlm.evaluation.perplexity import Perplexity
from tnlm.evaluation.tasks.base import Scores
from tnlm.utils.notebook import fragment


@dataclass(frozen=True)
class Figure:
    """One metric of one task.

    Attributes:
        metric: its name.
        value: its value over all items.
        stderr: standard error of the value; None for a single item.
        higher_is_better: None if neither direction is, as for a preference whose ideal is 0.5.
        baseline: the baseline's value, if there is a baseline.
        difference: the value minus the baseline's.
        difference_stderr: standard error of the difference, paired over items.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None = True
    baseline: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        task: its name.
        n: number of items that were scored.
        num_fewshot: examples for each item.
        truncated: number of prompts that lost their first tokens because they were too long.
        figures: one for each metric.
        right: the score that shows whether an item is answered correctly; empty if there is none.
        items: the scores of each item.
        digest: hash of the questions; results can only be compared if it is the same.
        flips: changes in correctness compared with the baseline, if items are right or wrong.
        skipped: indices of items that were not scored, as a choice is longer than the window.
    """

    task: str
    n: int
    num_fewshot: int
    truncated: int
    figures: tuple[Figure, ...]
    right: str
    items: tuple[Scores, ...]
    digest: str
    flips: Flips | None = None
    skipped: tuple[int, ...] = ()

    def __getitem__(self, metric: str) -> Figure:
        """Return the figure of a metric."""
        found = {figure.metric: figure for figure in self.figures}
        if metric not in found:
            raise EvaluationError(
                f"{self.task} has no metric {metric!r}{did_you_mean(metric, found)}"
            )
        return found[metric]


@dataclass(frozen=True)
class Evaluation:
    """Results of several tasks under one protocol.

    Attributes:
        results: one per task, in the order given.
        scorer: ``lm-eval`` with its version, or ``tnlm`` for a text alone.
        seed: seed of the few-shot draws and bootstraps.
        perplexity: perplexity of the text, with its protocol, if one was measured.

    Example:
        >>> figure = Figure("acc", 0.5, 0.1)
        >>> result = TaskResult("piqa", 26, 0, 0, (figure,), "acc", (), "")
        >>> print(Evaluation((result,), "lm-eval 0.4.13", 1234))
        task  n   shots  metric  value   stderr
        piqa  26  0      acc     0.5000  0.1000
        scored by lm-eval 0.4.13, seed 1234
    """

    results: tuple[TaskResult, ...]
    scorer: str
    seed: int
    perplexity: Perplexity | None = None

    def __getitem__(self, task: str) -> TaskResult:
        """Return the result of a task."""
        found = {result.task: result for result in self.results}
        if task not in found:
            raise EvaluationError(f"{task!r} was not evaluated{did_you_mean(task, found)}")
        return found[task]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values, with the perplexity's beside the results."""
        found = asdict(self)
        return {**(found.pop("perplexity") or {}), **found}

    def to_json(self) -> str:
        """Return the evaluation, with the scores of every item, as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read an evaluation written by :meth:`to_json`, e.g. to use it as a baseline.

        Raises:
            EvaluationError: if the text is not an evaluation.
        """
        try:
            stored = json.loads(text)
            results = tuple(_result(each) for each in stored["results"])
            return cls(results, str(stored["scorer"]), int(stored["seed"]), _perplexity(stored))
        except (ValueError, TypeError, LookupError, AttributeError) as err:
            raise EvaluationError(f"not an evaluation in JSON: {err!r}") from err

    def __str__(self) -> str:
        """Return the figures as a table, followed by the flips."""
        return "\n".join([*aligned(self._rows()), *self._notes()])

    def __repr__(self) -> str:
        """Return every figure, in one line."""
        found = [f"{r.task} {f.metric} {f.value:.4g}" for r in self.results for f in r.figures]
        return f"<Evaluation {', '.join(found)}>"

    def _repr_html_(self) -> str:
        """Return the table, for a notebook."""
        return fragment("Evaluation", self._notes(), self._rows())

    def _rows(self) -> list[list[str]]:
        compared = any(f.baseline is not None for r in self.results for f in r.figures)
        headings = ["task", "n", "shots", "metric", "value", "stderr"]
        rows = [headings + ["baseline", "difference", "stderr"] * compared]
        rows += [_row(r, figure, compared=compared) for r in self.results for figure in r.figures]
        return rows

    def _notes(self) -> list[str]:
        lines = [f"{r.task}: {r.flips}" for r in self.results if r.flips is not None]
        lines += [f"{r.task}: {r.truncated} cut" for r in self.results if r.truncated]
        lines += [
            f"{r.task}: {len(r.skipped)} skipped, longer than the window"
            for r in self.results
            if r.skipped
        ]
        lines += [] if self.perplexity is None else [str(self.perplexity)]
        return [*lines, f"scored by {self.scorer}, seed {self.seed}"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as lines with aligned columns.

    Example:
        >>> aligned([["a", "bc"], ["def", "g"]])
        ['a    bc', 'def  g']
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def _row(result: TaskResult, figure: Figure, *, compared: bool) -> list[str]:
    """Return the cells of one figure."""
    cells = [result.task, str(result.n), str(result.num_fewshot), figure.metric]
    numbers = [figure.value, figure.stderr]
    if compared:
        numbers += [figure.baseline, figure.difference, figure.difference_stderr]
    return [*cells, *("" if number is None else f"{number:.4f}" for number in numbers)]


def _perplexity(stored: Mapping[str, Any]) -> Perplexity | None:
    """Read the perplexity of a text from JSON values, if there is one."""
    if "perplexity" not in stored:
        return None
    return Perplexity(**{field.name: stored[field.name] for field in fields(Perplexity)})


def _result(stored: Mapping[str, Any]) -> TaskResult:
    """Read one result from JSON values."""
    flips = stored["flips"]
    if flips is not None:
        flips = Flips(**{name: tuple(items) for name, items in flips.items()})
    figures = tuple(Figure(**figure) for figure in stored["figures"])
    known = {**stored, "figures": figures, "items": tuple(stored["items"]), "flips": flips}
    known["skipped"] = tuple(stored.get("skipped", ()))
    return TaskResult(**known)
