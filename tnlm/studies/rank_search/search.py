"""rank_search: the rank of every matrix, found by trial from the last matrix to the first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.allocation.uniform import stay_dense
from tnlm.compression.choices import Calibration
from tnlm.compression.covered import with_coverage
from tnlm.compression.job import Job, prepare
from tnlm.compression.pipeline import carry_out
from tnlm.errors import BudgetError, EvaluationError
from tnlm.evaluation.flips import Flips, flips
from tnlm.plans.plan import Plan
from tnlm.studies.journal import Journal, check_journal
from tnlm.studies.mounted import mounting
from tnlm.studies.rank_search.options import (
    check_options,
    matrices_of,
    request_of,
    splits_of,
)
from tnlm.studies.rank_search.ranks import CANDIDATES
from tnlm.studies.rank_search.scorers import ItemScore, Measured
from tnlm.studies.rank_search.splits import check_disjoint, chunks_of
from tnlm.studies.rank_search.strategies import RankSearch, RankTrial, Subset
from tnlm.targets.base import Selector
from tnlm.utils.hashing import model_hash

FILE = "search.jsonl"
"""The journal of a search, in its output_dir."""


@dataclass(frozen=True)
class RankSearchResult:
    """The result of a rank search.

    Attributes:
        plan: the decision for every matrix.
        score: the name of what was measured.
        trials: every rank that was tried, in order.
        search: the score of the dense and of the compressed model on the items that decided.
        report: the same on the other items.
        flips: items of the report split that were learned and unlearned, if each has a score.
    """

    plan: Plan
    score: str
    trials: tuple[RankTrial, ...]
    search: tuple[float, float]
    report: tuple[float, float]
    flips: Flips | None

    def __str__(self) -> str:
        lines = [
            f"{self.score} on {split}: {before:.6g} dense, {after:.6g} compressed"
            for split, (before, after) in (("search", self.search), ("report", self.report))
        ]
        table = [] if self.flips is None else [str(self.flips)]
        return "\n".join([str(self.plan), f"trials:  {len(self.trials)}", *lines, *table])

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self), indent=1)


def rank_search(
    model: PreTrainedModel,
    score: str | ItemScore,
    *,
    search: Any,
    report: Any,
    scheme: str = "sfsd",
    targets: Selector | None = None,
    ignore: Selector | None = None,
    order: str = "reverse",
    candidates: Sequence[float] = CANDIDATES,
    delta: float | None = None,
    growth: float | None = None,
    keep: float | None = None,
    chunks: int = 1,
    calibration: Any = None,
    tokenizer: Any = None,
    num_samples: int | None = None,
    max_length: int = 512,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> RankSearchResult:
    """Compress a model in place, with the rank of every matrix found by trial.

    Each matrix is fitted once; smaller ranks are slices of that fit. The search goes from the last
    matrix to the first. It tries the candidate ranks of a matrix in ascending order and keeps the
    first at which the model still scores well enough; a matrix without such a rank stays dense. In
    this order one calibration is enough, because compressing a matrix never changes the inputs of
    those before it.

    With ``keep``, every rank of every matrix is measured alone instead, and the ranks that cost
    least per parameter saved are chosen until the budget is met.

    If anything fails, the model is left unchanged.

    Args:
        model: any Hugging Face model, not quantized.
        score: ``"perplexity"``, for a causal model; or a callable that takes the model and items
            and returns one score, or one per item (an item counts as right from 0.5 on). Higher is
            better.
        search: the items that decide. For the perplexity: texts, a file or ids, cut into windows of
            ``max_length``. For a callable: a list of items made of plain values.
        report: the items on which the result is reported, in the same form. None may be in both.
        scheme: a low-rank scheme whose fits are nested: ``"sfsd"``, ``"svd-llm"``, ``"svd"``, ...
        targets: the matrices; see :func:`tnlm.targets.selection.select`. The scheme has a default.
        ignore: matrices left alone, in the same form; the paper leaves those of the first blocks.
        order: ``"reverse"`` or ``"forward"``. Calibration is always that of the dense model.
        candidates: ranks to try, as fractions of the rank at which a matrix would have as many
            parameters as now.
        delta: how far a callable's score may fall below the dense model's; 0 if not given.
        growth: factor by which the perplexity may grow per matrix tried; 1.005 if not given.
        keep: fraction of the whole model's parameters to keep; replaces ``delta`` and ``growth``.
        chunks: how many parts ``search`` is cut into, in order. The first rank within the limit is
            found on each part, and the largest of these must be within the limit on all items, or
            the matrix stays dense. The paper's code uses 3.
        calibration: data for the fits, as for :func:`tnlm.compress`.
        tokenizer: turns texts into ids.
        num_samples: how many windows of calibration data to use (64 if not given).
        max_length: tokens per window.
        cache_dir: keeps calibration statistics between runs.
        output_dir: keeps every measurement in ``search.jsonl``, so that the same search resumes
            after an interruption.
        seed: draws the windows of calibration data (0 if not given).
        progress: show a progress bar.

    Returns:
        The plan, the trials, and the score before and after on both splits.

    Raises:
        OptionError: if an option is invalid or has no effect.
        EvaluationError: if splits overlap or are empty, or a score is not finite.
        BudgetError: if no rank of any matrix is within the limit, or the budget cannot be met.
        CheckpointError: if ``output_dir`` cannot be written or belongs to another search.

    Source: SFSD, Chavan et al. 2024, arXiv 2405.13039; the budget is ours.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.randint(9, (200,), generator=torch.Generator().manual_seed(0))
        >>> found = rank_search(model, "perplexity", search=ids[:80], report=ids[80:],
        ...                     scheme="svd", growth=1.1, max_length=20, progress=False)
        >>> found.plan.model_after.params < found.plan.model.params
        True
    """
    request = request_of(scheme)
    check_options(score, order, candidates, delta, growth, keep, chunks)
    file = None if output_dir is None else Path(output_dir) / FILE
    if file is not None:
        check_journal(file)
    scorer, splits = splits_of(model, score, search, report, delta, growth, tokenizer, max_length)
    names, chunked = check_disjoint(*splits), chunks_of(splits[0], chunks)
    # The splits are cut by the same length and tokenizer, so these act without calibration data.
    shared = (tokenizer, max_length) if request.looks_at_data else (None, None)
    data = Calibration(
        calibration, shared[0], num_samples, shared[1], cache_dir=cache_dir, seed=seed
    )
    job = prepare(model, request, targets, ignore, data, progress)
    matrices = matrices_of(model, job, candidates, order)
    journal = Journal(
        file,
        {
            "model": model_hash(model),
            "calibration": job.evidence.fingerprint or None,
            "search": names[0],
            "report": names[1],
            "metric": scorer.name,
            "scheme": scheme,
            "order": order,
            "ranks": [[matrix.target.name, *matrix.ranks] for matrix in matrices],
            "delta": delta,
            "growth": growth,
            "keep": keep,
            "chunks": chunks,
        },
    )
    before = [scorer.measure(model, items) for items in splits]
    whole = Subset(splits[0], before[0].loss)
    parts = [
        Subset(items, scorer.measure(model, items).loss, number)
        for number, items in enumerate(chunked, start=1)
    ]
    with mounting(model, job.selection.targets) as mounted:
        tried = RankSearch(model, mounted, job.evidence.metric, matrices, scorer, journal, progress)
        if keep is None:
            tried.to_tolerance(whole, parts)
        else:
            tried.to_budget(whole, _wanted(model, keep))
        after = [scorer.measure(model, items) for items in splits]
    _check_result(tried, before[0], after[0], bounded=keep is None)
    plan = _plan(model, job, tried, keep)
    ready = {name: fitted.fit for name, fitted in tried.chosen.items()}
    carry_out(model, replace(job, ready=ready), plan, progress)
    return _result(plan, tried, before, after)


def _result(
    plan: Plan, tried: RankSearch, before: Sequence[Measured], after: Sequence[Measured]
) -> RankSearchResult:
    """Return the result, from what was measured on both splits before and after."""
    scored = before[1].items, after[1].items
    return RankSearchResult(
        plan,
        tried.scorer.name,
        tuple(tried.trials),
        (before[0].value, after[0].value),
        (before[1].value, after[1].value),
        None if scored[0] is None or scored[1] is None else flips(scored[0], scored[1]),
    )


def _wanted(model: PreTrainedModel, keep: float) -> int:
    """Return how many parameters the model must save."""
    return math.ceil((1 - keep) * model_cost(model).params - 1e-6)


def _check_result(tried: RankSearch, before: Measured, after: Measured, *, bounded: bool) -> None:
    """Raise an error if nothing was compressed, or if the loss ended up above its limit."""
    if not tried.chosen:
        excess = (t.loss - t.limit for t in tried.trials if t.limit is not None)
        raise BudgetError(
            f"no rank of any of {len(tried.matrices)} matrices is good enough: the best exceeds "
            f"its limit by {min(excess, default=math.inf):.6g}; allow more with delta= or growth=, "
            "or use larger candidates=",
            argument=("growth", "candidates"),
        )
    limit = tried.scorer.limit(before.loss, len(tried.matrices))
    if bounded and after.loss > limit:
        raise EvaluationError(
            f"the loss ended up at {after.loss:.6g}, above the limit of {limit:.6g} that every "
            f"step kept: {tried.scorer.name} varies between measurements of the same model"
        )


def _plan(model: PreTrainedModel, job: Job, tried: RankSearch, keep: float | None) -> Plan:
    request, chosen = job.request, tried.chosen
    note = "not needed for the budget" if keep is not None else "no rank was good enough"
    layers = tuple(
        chosen[target.name].layer
        if target.name in chosen
        else stay_dense(target, target.weight(model), note)
        for target in job.selection.targets
    )
    record = {**job.chosen, **request.record(), "search": "rank"}
    if keep is not None:
        record["keep"] = keep
    skipped = job.selection.skipped
    decided = Plan(
        request.scheme.name, request.measure.name, record, layers, model_cost(model), skipped
    )
    return with_coverage(model, job.selection, decided)
