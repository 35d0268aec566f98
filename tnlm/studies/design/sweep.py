"""sweep: the score of a model under one configuration after another."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.errors import EvaluationError, TnlmError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.variants import Variants
from tnlm.studies.journal import Journal, Row
from tnlm.studies.scores import ModelScore, named_scores
from tnlm.studies.table import as_csv
from tnlm.utils.hashing import model_hash


@dataclass(frozen=True)
class Trial:
    """One configuration and its score.

    Attributes:
        configuration: what was decomposed.
        percent: percentage of the model's parameters that is removed, as stored.
        published: the same percentage as the literature counts it.
        macs: multiply-adds per token of the whole model.
        values: what the score returned, by name; empty if it failed.
        error: why it failed, if it did.
    """

    configuration: Configuration
    percent: float
    published: float
    macs: int
    values: dict[str, float]
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        dense: the dense model.
        trials: the configurations, in the order given.
    """

    dense: Trial
    trials: tuple[Trial, ...]

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials whose score failed."""
        return tuple(trial for trial in self.trials if trial.error is not None)

    def changes(self, trial: Trial) -> dict[str, float]:
        """Return the differences of a trial's values from those of the dense model."""
        return {name: value - self.dense.values[name] for name, value in trial.values.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per trial, the dense model first."""
        return [
            {
                **trial.configuration.row(),
                "percent": trial.percent,
                "published_percent": trial.published,
                "macs": trial.macs,
                **{name: trial.values.get(name) for name in self.dense.values},
                **{f"{name}_change": self.changes(trial).get(name) for name in self.dense.values},
                "error": trial.error,
            }
            for trial in (self.dense, *self.trials)
        ]

    def to_json(self) -> str:
        """Return the rows as JSON text."""
        return json.dumps(self.rows(), indent=1)

    def to_csv(self) -> str:
        """Return the rows as CSV text."""
        return as_csv(self.rows())

    def __str__(self) -> str:
        lines = []
        for trial in (self.dense, *self.trials):
            values = ", ".join(f"{name} {value:.4g}" for name, value in trial.values.items())
            lines.append(f"{trial.percent:6.2f} %  {values or trial.error}  {trial.configuration}")
        return "\n".join(lines)


def sweep(
    model: PreTrainedModel,
    space: DesignSpace,
    score: ModelScore,
    configurations: Iterable[Configuration],
    *,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """ModelScore a model dense and under each configuration; it is left unchanged.

    If the score raises a :class:`tnlm.TnlmError` or is not finite, the trial is recorded as failed
    and the sweep continues. The dense model must not fail.

    Args:
        model: any Hugging Face model, not compressed.
        space: its design space. Configurations may break its rules, but must fit the model.
        score: takes the model; returns a number, or a mapping from names to numbers.
        configurations: what to measure, for example :func:`tnlm.studies.design.series.by_layer`.
        journal: a JSONL file to which every finished trial is added; trials in it are not measured
            again. It does not record which score it holds: use one file per score.
        progress: show a progress bar.

    Returns:
        The trials, with percentages and multiply-adds.

    Raises:
        CheckpointError: if the journal cannot be written, or belongs to another model or space.
        EvaluationError: if the dense model cannot be measured.
        TnlmError: other subclasses, if the model or a configuration does not fit the space.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tnlm.studies.design.series import by_layer
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> space = DesignSpace(model)
        >>> def size(model):
        ...     return sum(p.numel() for p in model.parameters())
        >>> found = sweep(model, space, size, by_layer(space), progress=False)
        >>> found.dense.values, [trial.values for trial in found.trials]
        ({'value': 1832.0}, [{'value': 1328.0}, {'value': 1328.0}])
    """
    wanted = list(dict.fromkeys(configurations))
    for configuration in wanted:
        space.targets(configuration)  # raises before any work if the model lacks something
    variants = Variants(model, space)
    about = {"space": space.to_dict(), "model": model_hash(model)}
    kept = Journal(journal, about)
    done: dict[str, Row] = dict(kept.rows)
    for configuration in tqdm([DENSE, *wanted], desc="sweep", disable=not progress):
        if configuration.key in done:
            continue
        row = done[configuration.key] = _attempt(variants, configuration, score)
        if configuration.is_dense and row["error"]:
            raise EvaluationError(f"the dense model cannot be measured: {row['error']}")
        _check_names(row, done[DENSE.key], configuration)
        kept.add(configuration.key, row)
    found = [_trial(space, c, done[c.key]) for c in (DENSE, *wanted)]
    return Sweep(found[0], tuple(found[1:]))


def _attempt(variants: Variants, configuration: Configuration, score: ModelScore) -> Row:
    """Measure one configuration; return its values, or why it failed."""
    try:
        with variants.applied(configuration) as model:
            return {"values": named_scores(model, score), "error": None}
    except TnlmError as error:
        return {"values": {}, "error": f"{type(error).__name__}: {error}"}


def _check_names(row: Row, dense: Row, configuration: Configuration) -> None:
    if row["values"] and row["values"].keys() != dense["values"].keys():
        raise EvaluationError(
            f"the score has names {[*row['values']]} for {configuration}, but "
            f"{[*dense['values']]} for the dense model; return the same names each time, and use "
            "one journal per score"
        )


def _trial(space: DesignSpace, configuration: Configuration, row: Row) -> Trial:
    return Trial(
        configuration,
        space.percent(configuration),
        space.percent(configuration, "published"),
        space.cost(configuration).macs,
        row["values"],
        row["error"],
    )
