"""Surgical search: the rank of every matrix by trial, from the last to the first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.allocation.uniform import stay_dense
from tnlm.calibration.store import model_hash
from tnlm.errors import BudgetError, EvaluationError
from tnlm.evaluation.flips import Flips, flips
from tnlm.job import Data, Job, prepare
from tnlm.pipeline import carry_out
from tnlm.planning import LayerPlan, Plan
from tnlm.studies.journal import Journal, check_journal
from tnlm.studies.mounted import Patient
from tnlm.studies.nested_ranks import CANDIDATES
from tnlm.studies.rank_search.options import (
    check_options,
    name_calibration,
    request_of,
    sites_of,
    splits_of,
)
from tnlm.studies.rank_search.scorers import Measured, TaskMetric
from tnlm.studies.rank_search.splits import check_disjoint, chunks_of
from tnlm.studies.rank_search.walk import Course, Part, Trial
from tnlm.targets import Selector

FILE = "search.jsonl"
"""The journal of a search, in its output_dir."""


@dataclass(frozen=True)
class SearchResult:
    """What a search decided, and what it did to the model.

    Attributes:
        plan: the decision for every matrix.
        metric: what was measured.
        trials: every rank that was tried, in order.
        search: the metric of the dense and of the compressed model, on what was searched on.
        report: the same on what was not.
        flips: items of the report split that were learned and unlearned, if each has a score.
    """

    plan: Plan
    metric: str
    trials: tuple[Trial, ...]
    search: tuple[float, float]
    report: tuple[float, float]
    flips: Flips | None

    def __str__(self) -> str:
        lines = [
            f"{self.metric} {split}: {before:.6g} dense, {after:.6g} compressed"
            for split, (before, after) in (("searched on", self.search), ("report", self.report))
        ]
        table = [] if self.flips is None else [str(self.flips)]
        return "\n".join([str(self.plan), f"trials:  {len(self.trials)}", *lines, *table])

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self), indent=1)


def surgical_search(
    model: PreTrainedModel,
    metric: str | TaskMetric,
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
    num_samples: int = 64,
    max_length: int = 512,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Find the rank of every matrix by trial, and compress the model in place.

    Each matrix is fitted once; smaller ranks are slices. From the last matrix to the first, ranks
    are tried from the smallest on, and the first one with which the model is good enough stays;
    a matrix without any stays dense. In this order one calibration serves all: what is compressed
    later never changes the inputs of what comes before it. With ``keep`` every rank of every matrix
    is measured by itself instead, and those of least damage for each number saved are taken until
    the budget is met.

    If anything fails, the model is left as it was.

    Args:
        model: any Hugging Face model, not quantized.
        metric: ``"perplexity"``, of a causal model; or a callable that takes the model and items
            and returns a score, or one for each item (from 0.5 on it is right). Higher is better.
        search: what is measured for every decision: for the perplexity texts, a file or ids, cut
            into windows of ``max_length``; for a callable a list of items of plain values.
        report: the same, for the final numbers. An item that is in both is refused.
        scheme: a low-rank scheme whose fits are nested: ``"sfsd"``, ``"svd-llm"``, ``"svd"``...
        targets: the matrices; see :func:`tnlm.targets.select`. The scheme has a default.
        ignore: matrices left alone, in the same words; as published, those of the first blocks.
        order: ``"reverse"``; or ``"forward"``, for which calibration is that of the dense model
            all the same.
        candidates: ranks, as parts of the one at which a matrix would have as many numbers as now.
        delta: how far a callable's score may fall below the dense model's (0 if not given).
        growth: factor by which the perplexity may grow with every matrix that was tried (1.005).
        keep: fraction of the whole model's parameters that remains; then nothing else limits.
        chunks: parts that ``search`` is cut into, in its order. The first rank that is good enough
            is found on each; the largest of them must be good enough on the whole, or the matrix
            stays dense. The paper's code takes 3.
        calibration: data for the fits, as for :func:`tnlm.compress`.
        tokenizer: turns texts into ids.
        num_samples: windows of calibration data used.
        max_length: tokens in a window.
        cache_dir: keeps calibration statistics between runs.
        output_dir: keeps what was measured in ``search.jsonl``, from which the same search goes on
            if it was cut off.
        seed: draws the windows of calibration data.
        progress: show a progress bar.

    Returns:
        The plan, the trials, and the metric before and after, on both splits.

    Raises:
        OptionError: for a choice that is not possible, or has no effect.
        EvaluationError: for splits that overlap or are empty, or a score that is not finite.
        BudgetError: if no rank of any matrix is good enough, or the budget cannot be met.
        CheckpointError: if ``output_dir`` cannot be written or is of another search.

    Source: SFSD, Chavan et al. 2024, arXiv 2405.13039; the budget is ours.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.randint(9, (200,), generator=torch.Generator().manual_seed(0))
        >>> found = surgical_search(model, "perplexity", search=ids[:80], report=ids[80:],
        ...                         scheme="svd", growth=1.1, max_length=20, progress=False)
        >>> found.plan.model_after.params < found.plan.model.params
        True
    """
    request = request_of(scheme)
    check_options(metric, order, candidates, delta, growth, keep, chunks)
    file = None if output_dir is None else Path(output_dir) / FILE
    if file is not None:
        check_journal(file)
    judge, splits = splits_of(model, metric, search, report, delta, growth, tokenizer, max_length)
    names, chunked = check_disjoint(*splits), chunks_of(splits[0], chunks)
    data = Data(calibration, tokenizer, num_samples, max_length, cache_dir, seed)
    job = prepare(model, request, targets, ignore, data, progress)
    sites = sites_of(model, job, candidates, order)
    journal = Journal(
        file,
        {
            "model": model_hash(model),
            "calibration": name_calibration(request, data),
            "search": names[0],
            "report": names[1],
            "metric": judge.name,
            "scheme": scheme,
            "order": order,
            "ranks": [[site.target.name, *site.ranks] for site in sites],
            "delta": delta,
            "growth": growth,
            "keep": keep,
            "chunks": chunks,
        },
    )
    before = [judge.measure(model, items) for items in splits]
    whole = Part(splits[0], before[0].damage)
    parts = [
        Part(items, judge.measure(model, items).damage, number)
        for number, items in enumerate(chunked, start=1)
    ]
    with Patient(model, job.selection.targets) as patient:
        course = Course(patient, job.metric, sites, judge, journal, progress)
        if keep is None:
            course.to_tolerance(whole, parts)
        else:
            course.to_budget(whole, _wanted(model, keep))
        after = [judge.measure(model, items) for items in splits]
    _check_end(course, before[0], after[0], bounded=keep is None)
    plan = _plan(model, job, patient, keep)
    job.ready = {name: rung.fit for name, rung in patient.rungs.items()}
    carry_out(model, job, plan, progress)
    scored = before[1].items, after[1].items
    return SearchResult(
        plan,
        judge.name,
        tuple(course.trials),
        (before[0].value, after[0].value),
        (before[1].value, after[1].value),
        None if scored[0] is None or scored[1] is None else flips(scored[0], scored[1]),
    )


def _wanted(model: PreTrainedModel, keep: float) -> int:
    """Return how many numbers fewer the model is to have."""
    return math.ceil((1 - keep) * model_cost(model).params - 1e-6)


def _check_end(course: Course, before: Measured, after: Measured, *, bounded: bool) -> None:
    """Refuse an end in which nothing was compressed, or that is worse than was allowed."""
    if not course.patient.rungs:
        excess = (t.damage - t.limit for t in course.trials if t.limit is not None)
        raise BudgetError(
            f"no rank of any of {len(course.sites)} matrices is good enough: the best is "
            f"{min(excess, default=math.inf):.6g} above what is allowed; allow more (delta=, "
            "growth=), or larger candidates="
        )
    limit = course.judge.limit(before.damage, len(course.sites))
    if bounded and after.damage > limit:
        raise EvaluationError(
            f"the damage is {after.damage:.6g} in the end, above the limit of {limit:.6g} that "
            f"every step kept: {course.judge.name} does not give the same for the same model"
        )


def _plan(model: PreTrainedModel, job: Job, patient: Patient, keep: float | None) -> Plan:
    def decided(name: str) -> LayerPlan | None:
        rung = patient.rungs.get(name)
        return None if rung is None else rung.layer

    request = job.request
    note = "not needed for the budget" if keep is not None else "no rank was good enough"
    layers = tuple(
        decided(target.name) or stay_dense(target, target.weight(model), note)
        for target in job.selection.targets
    )
    record: Mapping[str, Any] = {**job.chosen, **request.record(), "search": "surgical"}
    if keep is not None:
        record = {**record, "keep": keep}
    skipped = job.selection.skipped
    return Plan(
        request.scheme.name, request.measure.name, record, layers, model_cost(model), skipped
    )
