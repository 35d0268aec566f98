"""Intrinsic dimension: in how few random directions a model can learn a task."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.errors import OptionError
from tnlm.recovery.examples import batches
from tnlm.recovery.tasks import examples_for, model_kind, padding_for
from tnlm.studies.analysis.subspace import FullSpace, check_kind, layers_of
from tnlm.studies.analysis.subspace_search import Run, Trials
from tnlm.studies.analysis.training import Course
from tnlm.studies.journal import check_journal
from tnlm.studies.scores import Metric, check_metric, goal_of, measure, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "intrinsic.jsonl"
"""The journal of the scores, in an output_dir."""
SEEDS = 3
"""The fewest: what is found depends on the subspace drawn."""


@dataclass(frozen=True)
class IntrinsicDimension:
    """How few numbers had to be trained, with the protocol.

    Attributes:
        dimension: median over the seeds of the least d that was enough; None if it is greater than
            every d that was tried.
        interval: from the greatest d below that was not enough, plus 1, of the luckiest seed, to
            the least d that was enough of the unluckiest; None for a seed without any.
        by_seed: the least d that was enough, of each seed; None where none was.
        parameters: how many numbers the full training has.
        scales: how many of d are scales of layers (SAID).
        start: score without training.
        full: score of the full training, the mean over the seeds.
        target: score that is enough.
        threshold: share of the full training that is asked for.
        kind: ``"did"`` or ``"said"``.
        projection: ``"fastfood"`` or ``"dense"``.
        metric: what the scores are.
        runs: every subspace trained, in order.

    Example:
        >>> found = IntrinsicDimension(8, (5, 9), (8, 8, 9), 100, 0, 0.3, 1.0, 0.9, 0.9, "did",
        ...                            "fastfood", "accuracy", ())
        >>> print(found)
        d90 = 8 (5 to 9 over 3 seeds) of 100 parameters; did, fastfood; accuracy 0.3 before, 1
        trained in full, 0.9 wanted
    """

    dimension: int | None
    interval: tuple[int, int | None]
    by_seed: tuple[int | None, ...]
    parameters: int
    scales: int
    start: float
    full: float
    target: float
    threshold: float
    kind: str
    projection: str
    metric: str
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        return (
            f"d{round(100 * self.threshold)} {self._found()} of {self.parameters:,} parameters; "
            f"{self.kind}, {self.projection}; {self.metric} {self.start:.4g} before, "
            f"{self.full:.4g} trained in full, {self.target:.4g} wanted"
        )

    def _found(self) -> str:
        scales = f" ({self.scales} of them scales)" if self.scales else ""
        seeds, missed = len(self.by_seed), self.by_seed.count(None)
        most = max((run.d for run in self.runs), default=0)
        if self.dimension is None:
            which = f"any of {seeds}" if missed == seeds else f"{missed} of {seeds}"
            return f"> {most}{scales} (not enough for {which} seeds)"
        low, high = self.interval
        end = f"more than {most}" if high is None else high
        return f"= {self.dimension}{scales} ({low} to {end} over {seeds} seeds)"

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self), indent=1)


def intrinsic_dimension(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Any = None,
    kind: str = "did",
    projection: str = "fastfood",
    metric: Metric = "loss",
    threshold: float = 0.9,
    dims: Sequence[int] | None = None,
    seeds: int | Sequence[int] = SEEDS,
    steps: int = 200,
    learning_rate: float | Sequence[float] = 1e-3,
    batch_size: int = 8,
    max_length: int = 512,
    text: str = "text",
    label: str = "label",
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> IntrinsicDimension:
    """Find the least d such that training d numbers does ``threshold`` as well as training all.

    The numbers are the coordinates of the model's parameters in a random subspace; see
    :class:`tnlm.studies.analysis.subspace.Subspace`. Every run starts at the model as it is, and the model
    is left bit for bit as it was. What requires a gradient takes part, in the full training and in
    the subspaces alike.

    What is found is an upper bound: a better subspace, or a better training in it, may need less.

    Args:
        model: a causal or masked language model, or a sequence classifier.
        data: what it is trained on: texts, a file, ids, or labelled rows; see
            `tnlm.recovery.examples.training_set`.
        tokenizer: needed for text.
        held_out: what scores are measured on, in the same form; ``data`` itself if None.
        kind: ``"did"``; or ``"said"``, which spends one of d on a scale for every layer.
        projection: ``"fastfood"``; or ``"dense"``, whose time grows with d times the parameters.
        metric: ``"loss"`` of a prediction; ``"accuracy"``, of a classifier; or a callable that
            takes the model and returns a score, higher for a better model.
        threshold: share of the full training's score that is enough; of a loss, share of the full
            training's improvement.
        dims: all of these are tried, and the least that is enough counts; None doubles d until it
            is enough, and then halves the gap until it is at most 10 %.
        seeds: how many subspaces, at least 3; or their seeds. A seed draws the order of the data
            of its full training, too.
        steps: of every training.
        learning_rate: of Adam in the full training; in a subspace, what moves the model as far at
            first. Of several, the one with the best score counts, for every run by itself.
        batch_size: examples of a step.
        max_length: tokens of a sequence.
        text: the rows' text column.
        label: the rows' column of classes, for classifiers.
        output_dir: keeps every score in ``intrinsic.jsonl``. The same call goes on from there if it
            was cut off, and so does one with other ``dims``, ``seeds`` or ``threshold``. A callable
            metric is known by its name and by the score before training.
        progress: show a progress bar.

    Returns:
        The dimension, with an interval over the seeds and every score; if no d is enough, the
        scores all the same.

    Raises:
        OptionError: for a choice that is not possible.
        TrainingError: for data that cannot be used, or a loss that is not finite.
        EvaluationError: if the full training is no better than none.
        CheckpointError: if ``output_dir`` cannot be written, or holds scores of something else.

    Source: Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2021, arXiv 2012.13255.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(64) % 3
        >>> found = intrinsic_dimension(model, ids, max_length=16, steps=20, learning_rate=1e-2,
        ...                             dims=[20, 400], progress=False)
        >>> found.dimension in (20, 400)
        True
    """
    file = None if output_dir is None else Path(output_dir) / FILE
    if file is not None:
        check_journal(file)
    check_kind(kind, projection)
    check_metric(metric, model_kind(model))
    chosen = _seeds(seeds)
    least, most = _bounds(model, kind)
    _check_sizes(threshold, dims, least, most)
    examples, tests = (
        examples_for(model, rows, tokenizer, max_length=max_length, text=text, label=label)
        for rows in (data, data if held_out is None else held_out)
    )
    pad = padding_for(model, tokenizer, batch_size)
    courses = [Course(steps, batch_size, rate, pad) for rate in _rates(learning_rate)]
    held = batches(tests, batch_size, pad)
    with tqdm(desc="training", unit="run", disable=not progress) as bar:
        trials = Trials(model, kind, projection, metric, examples, held, courses, bar.update)
        start = measure(model, metric, held)
        if file is not None:
            trials.open(file, start)
        full = statistics.fmean(trials.score(None, seed) for seed in chosen)
        goal = goal_of(metric, start, full, threshold)
        ends = [trials.bracket(goal, seed, dims, least, most) for seed in chosen]
    highs = [math.inf if high is None else high for _, high in ends]
    return IntrinsicDimension(
        dimension=_whole(statistics.median_high(highs)),
        interval=(min(low for low, _ in ends) + 1, _whole(max(highs))),
        by_seed=tuple(high for _, high in ends),
        parameters=most,
        scales=least - 1,
        start=start,
        full=full,
        target=goal.target,
        threshold=threshold,
        kind=kind,
        projection=projection,
        metric=name_of(metric),
        runs=tuple(trials.runs),
    )


def _whole(d: float) -> int | None:
    return None if d == math.inf else int(d)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(set(chosen)) != len(chosen) or len(chosen) < SEEDS:
        raise OptionError(
            f"seeds={seeds!r}; allowed: at least {SEEDS} different ones, as what is found depends "
            "on the subspace drawn"
        )
    return chosen


def _rates(learning_rate: float | Sequence[float]) -> list[float]:
    rates = [learning_rate] if isinstance(learning_rate, int | float) else list(learning_rate)
    if not rates:
        raise OptionError("learning_rate=[]; give one rate, or several to choose from")
    return rates


def _bounds(model: PreTrainedModel, kind: str) -> tuple[int, int]:
    """Return the least and the greatest d."""
    space = FullSpace(model)
    return (len(layers_of(space.start)) if kind == "said" else 0) + 1, space.total


def _check_sizes(threshold: float, dims: Sequence[int] | None, least: int, most: int) -> None:
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold={threshold!r}; allowed: above 0, at most 1")
    if dims is None:
        return
    if not dims:
        raise OptionError("dims=[]; give the sizes to try, or None to search")
    for d in dims:
        if not isinstance(d, int) or isinstance(d, bool) or not least <= d <= most:
            scales = f", with {least - 1} of them for the scales of layers" if least > 1 else ""
            raise OptionError(f"dims holds {d!r}; the model allows {least} to {most}{scales}")
