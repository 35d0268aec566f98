"""What a surgical search is asked for, checked: fits, measurements, matrices and their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.data import fingerprint, token_batches
from tnlm.decompositions.low_rank import FORMAT
from tnlm.errors import BudgetError, EvaluationError, OptionError, TargetError, did_you_mean
from tnlm.job import Data, Job
from tnlm.recovery.tasks import examples_for, model_kind, padding_for
from tnlm.request import Request, make_request
from tnlm.studies.nested_ranks import Site, check_candidates, site_of
from tnlm.studies.rank_search.scorers import Judge, PerplexityJudge, TaskJudge, TaskMetric

ORDERS = ("reverse", "forward")


def request_of(scheme: str) -> Request:
    """Return the request behind the fits, if they are nested."""
    request = make_request(scheme, allocation="uniform", options={})
    nested = request.structures == (FORMAT,) and not request.measure.is_elementwise
    tunes = request.cascade != "none" or request.recover != "none" or request.share > 1
    if not nested or tunes:
        raise OptionError(
            f"scheme={scheme!r} with a surgical search, which takes all ranks of a matrix from one "
            "fit; allowed: low-rank schemes without a cascade, recovery, shared factors or "
            "element-wise weights, such as sfsd, svd-llm, svd"
        )
    return request


def check_options(
    metric: str | TaskMetric,
    order: str,
    candidates: Sequence[float],
    delta: float | None,
    growth: float | None,
    keep: float | None,
    chunks: int,
) -> None:
    """Refuse choices that are not possible, or have no effect."""
    if not callable(metric) and metric != "perplexity":
        hint = did_you_mean(str(metric), ["perplexity"])
        raise OptionError(f"metric={metric!r}{hint}, or a callable")
    if order not in ORDERS:
        raise OptionError(f"order={order!r}{did_you_mean(str(order), ORDERS)}")
    check_candidates(candidates)
    if keep is not None and not (isinstance(keep, int | float) and 0 < keep < 1):
        raise BudgetError(f"keep={keep!r}; allowed: a fraction of the model, between 0 and 1")
    if not isinstance(chunks, int) or chunks < 1:
        raise OptionError(f"chunks={chunks!r}; allowed: whole numbers from 1 on")
    if chunks > 1 and keep is not None:
        raise OptionError("chunks= has no effect with keep=, where the budget decides")
    for name, value, used in (
        ("delta", delta, callable(metric)),
        ("growth", growth, not callable(metric)),
    ):
        if value is not None and keep is not None:
            raise OptionError(f"{name}= has no effect with keep=, where the budget decides")
        if value is not None and not used:
            raise OptionError(f"{name}= has no effect on metric={metric!r}; leave it out")


def splits_of(
    model: PreTrainedModel,
    metric: str | TaskMetric,
    search: Any,
    report: Any,
    delta: float | None,
    growth: float | None,
    tokenizer: Any,
    max_length: int,
) -> tuple[Judge, tuple[Sequence[Any], Sequence[Any]]]:
    """Return what measures, and the items of both splits."""
    if callable(metric):
        for name, items in (("search", search), ("report", report)):
            if not isinstance(items, list | tuple):
                raise EvaluationError(f"{name}= is a {type(items).__name__}; give a list of items")
        return TaskJudge(metric, delta), (search, report)
    if model_kind(model) != "causal":
        raise OptionError(
            f"metric='perplexity' of a {type(model).__name__}; it is that of causal language "
            "models: give a callable"
        )
    made = [examples_for(model, d, tokenizer, max_length=max_length) for d in (search, report)]
    judge = PerplexityJudge(growth, padding_for(model, tokenizer, 1))
    return judge, (made[0].items, made[1].items)


def sites_of(
    model: PreTrainedModel, job: Job, candidates: Sequence[float], order: str
) -> list[Site]:
    """Return the matrices in the order in which they are tried; pass over other kinds."""
    gauge, sites, chosen = bool(job.request.options.get("gauge", True)), [], job.selection
    for target in list(chosen.targets):
        if target.kind != "linear":
            chosen.targets.remove(target)
            chosen.skipped[target.name] = "a surgical search replaces linear matrices only"
            continue
        biased = target.bias(model) is not None
        extra = target.shape[0] if job.request.measure.adds_bias and not biased else 0
        sites.append(site_of(target, candidates, gauge=gauge, extra=extra))
    if not sites:
        name, reason = next(iter(chosen.skipped.items()))
        raise TargetError(f"no target is left; {name}: {reason}")
    return sites[::-1] if order == "reverse" else sites


def name_calibration(request: Request, data: Data) -> str | None:
    """Name calibration data by its tokens; None if none is used."""
    if not request.looks_at_data:
        return None
    made = token_batches(
        data.calibration,
        data.tokenizer,
        num_samples=data.num_samples,
        max_length=data.max_length,
        seed=data.seed,
    )
    return fingerprint(made)
