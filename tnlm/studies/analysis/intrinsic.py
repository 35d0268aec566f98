"""intrinsic_dimension: in how few random directions a model can learn a task."""

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
from tnlm.recovery.model_kinds import examples_for, model_kind, padding_for
from tnlm.studies.analysis.goals import goal_of
from tnlm.studies.analysis.subspace import FullSpace, check_kind, layers_of
from tnlm.studies.analysis.subspace_search import SubspaceRun, SubspaceSearch
from tnlm.studies.analysis.training import TrainingConfig
from tnlm.studies.journal import check_journal
from tnlm.studies.scores import Score, check_score, measure, name_of
from tnlm.utils.checks import check_whole, is_real

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "intrinsic.jsonl"
"""The journal of scores, in an output_dir."""
SEEDS = 3
"""The smallest number of seeds: the result depends on the subspaces drawn."""


@dataclass(frozen=True)
class IntrinsicDimension:
    """The intrinsic dimension of a task, with the protocol.

    Attributes:
        dimension: median over the seeds of the smallest d that was enough; None if that is larger
            than every d tried.
        interval: lower and upper end over the seeds. The lower one is 1 more than the smallest of
            the d that were just too small; the upper one is the largest d that was needed, None if
            a seed needs more than was tried.
        by_seed: the smallest d that was enough for each seed; None where none was.
        parameters: how many parameters the full training has.
        scales: how many of d are scales of layers (SAID).
        start: score without training.
        full: score of the full training, the mean over the seeds.
        target: score that is enough.
        threshold: the fraction of the full training that must be reached.
        kind: ``"did"`` or ``"said"``.
        projection: ``"fastfood"`` or ``"dense"``.
        score: the name of what was measured.
        runs: every subspace trained, in order.

    Example:
        >>> found = IntrinsicDimension(8, (5, 9), (8, 8, 9), 100, 0, 0.3, 1.0, 0.9, 0.9, "did",
        ...                            "fastfood", "accuracy", ())
        >>> print(found)
        d90 = 8 (5 to 9 over 3 seeds) of 100 parameters; did, fastfood; accuracy: 0.3 before, 1
        after full training, 0.9 is enough
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
    score: str
    runs: tuple[SubspaceRun, ...]

    def __str__(self) -> str:
        return (
            f"d{round(100 * self.threshold)} {self._found()} of {self.parameters:,} parameters; "
            f"{self.kind}, {self.projection}; {self.score}: {self.start:.4g} before, "
            f"{self.full:.4g} after full training, {self.target:.4g} is enough"
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
    score: Score = "loss",
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
    """Find the smallest d such that training d parameters is nearly as good as training all.

    The d parameters are coordinates of the model's parameters in a random subspace; see
    :class:`tnlm.studies.analysis.Subspace`. Every training starts from the model as it is, and the
    model is left bit-identical. Only parameters that require a gradient are trained, in the full
    training as in the subspaces.

    The result is an upper bound: a better subspace or a better training may need fewer.

    Args:
        model: a causal or masked language model, or a sequence classifier.
        data: training data: texts, a file, ids, or labelled rows; see
            `tnlm.recovery.examples.training_set`.
        tokenizer: needed for text.
        held_out: data for the scores, in the same form; the training data if None.
        kind: ``"did"``; or ``"said"``, which spends one of d on a scale for each layer.
        projection: ``"fastfood"``; or ``"dense"``, which takes time in proportion to d times the
            number of parameters.
        score: ``"loss"``; ``"accuracy"``, for a classifier; or a callable that takes the model and
            returns a score that is higher for better models.
        threshold: fraction of the full training's score that is enough; for a loss, fraction of the
            full training's improvement.
        dims: values of d to try. None doubles d until it is enough, and then bisects until the gap
            is at most 10 %.
        seeds: number of subspaces, at least 3; or their seeds. A seed also draws the order of the
            data in its full training.
        steps: steps of each training.
        learning_rate: learning rate of Adam in the full training; in a subspace it is scaled so
            that the first step moves the model as far. If several are given, each training uses
            the one with the best score.
        batch_size: examples per step.
        max_length: tokens per sequence.
        text: name of the text column of the rows.
        label: name of the class column of the rows, for classifiers.
        output_dir: keeps every score in ``intrinsic.jsonl``. The same call resumes from there after
            an interruption, and so does one with other ``dims``, ``seeds`` or ``threshold``. A
            callable is identified by its name and by the score before training.
        progress: show a progress bar.

    Returns:
        The dimension, with an interval over the seeds and every score. If no d is enough, the
        dimension is None.

    Raises:
        OptionError: if an option is invalid.
        TrainingError: if data cannot be used, or a loss is not finite.
        EvaluationError: if the full training does not improve the score.
        CheckpointError: if ``output_dir`` cannot be written or holds scores of another search.

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
    check_score(score, model_kind(model))
    chosen = _seeds(seeds)
    least, most = _bounds(model, kind)
    _check_sizes(threshold, dims, least, most)
    examples, tests = (
        examples_for(model, rows, tokenizer, max_length=max_length, text=text, label=label)
        for rows in (data, data if held_out is None else held_out)
    )
    pad = padding_for(model, tokenizer, batch_size)
    configs = [TrainingConfig(steps, batch_size, rate, pad) for rate in _rates(learning_rate)]
    held = batches(tests, batch_size, pad)
    with tqdm(desc="training", unit="run", disable=not progress) as bar:
        search = SubspaceSearch(model, kind, projection, score, examples, held, configs, bar.update)
        start = measure(model, score, held)
        if file is not None:
            search.open(file, start)
        full = statistics.fmean(search.score(None, seed) for seed in chosen)
        goal = goal_of(score, start, full, threshold)
        ends = [search.bracket(goal, seed, dims, least, most) for seed in chosen]
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
        score=name_of(score),
        runs=tuple(search.runs),
    )


def _whole(d: float) -> int | None:
    return None if d == math.inf else int(d)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(set(chosen)) != len(chosen) or len(chosen) < SEEDS:
        raise OptionError(
            f"seeds={seeds!r}; allowed: at least {SEEDS} different ones, as the result depends on "
            "the subspaces drawn"
        )
    return chosen


def _rates(learning_rate: float | Sequence[float]) -> list[float]:
    rates = [learning_rate] if isinstance(learning_rate, int | float) else list(learning_rate)
    if not rates:
        raise OptionError("learning_rate=[]; give one rate, or several to choose from")
    return rates


def _bounds(model: PreTrainedModel, kind: str) -> tuple[int, int]:
    """Return the smallest and the largest d."""
    space = FullSpace(model)
    return (len(layers_of(space.start)) if kind == "said" else 0) + 1, space.total


def _check_sizes(threshold: float, dims: Sequence[int] | None, least: int, most: int) -> None:
    if not is_real(threshold) or not 0 < threshold <= 1:
        raise OptionError(f"threshold={threshold!r}; allowed: above 0, at most 1")
    if dims is None:
        return
    if not dims:
        raise OptionError("dims=[]; give the values of d to try, or None to search")
    for d in dims:
        check_whole("dims with d", d, least, most)
