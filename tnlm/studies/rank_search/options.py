"""Checks what a rank search is asked for, and turns it into what the search works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tnlm.compression.job import Job
from tnlm.compression.request import Request, make_request
from tnlm.decompositions.low_rank import FORMAT
from tnlm.errors import BudgetError, EvaluationError, OptionError, TargetError, did_you_mean
from tnlm.recovery.model_kinds import examples_for, model_kind, padding_for
from tnlm.studies.rank_search.ranks import MatrixRanks, check_candidates
from tnlm.studies.rank_search.scorers import CallableScorer, ItemScore, PerplexityScorer, Scorer
from tnlm.targets.matrix import MatrixTarget
from tnlm.utils.checks import check_whole, is_real

ORDERS = ("reverse", "forward")


def request_of(scheme: str) -> Request:
    """Return the request for the fits of a scheme, if smaller ranks are slices of larger ones."""
    request = make_request(scheme, allocation="uniform")
    nested = request.structures == (FORMAT,) and not request.measure.elementwise
    tunes = request.cascade != "none" or request.recover != "none" or request.share > 1
    if not nested or tunes:
        raise OptionError(
            f"scheme={scheme!r} in a rank search, which takes all ranks of a matrix from one fit; "
            "allowed: low-rank schemes without a cascade, recovery, shared factors or element-wise "
            "weights, such as sfsd, svd-llm and svd",
            argument="scheme",
        )
    return request


def check_options(
    score: str | ItemScore,
    order: str,
    candidates: Sequence[float],
    delta: float | None,
    growth: float | None,
    keep: float | None,
    chunks: int,
) -> None:
    """Raise an error for options that are invalid or would have no effect."""
    if not callable(score) and score != "perplexity":
        hint = did_you_mean(str(score), ["perplexity"])
        raise OptionError(f"score={score!r}{hint}, or a callable")
    if order not in ORDERS:
        raise OptionError(f"order={order!r}{did_you_mean(str(order), ORDERS)}", argument="order")
    check_candidates(candidates)
    if keep is not None and not (is_real(keep) and 0 < keep < 1):
        raise BudgetError(
            f"keep={keep!r}; allowed: a fraction of the model, between 0 and 1", argument="keep"
        )
    check_whole("chunks", chunks)
    if chunks > 1 and keep is not None:
        raise OptionError(
            "chunks= has no effect with keep=, where the budget decides",
            argument=("chunks", "keep"),
        )
    for name, value, used in (
        ("delta", delta, callable(score)),
        ("growth", growth, not callable(score)),
    ):
        if value is not None and keep is not None:
            raise OptionError(
                f"{name}= has no effect with keep=, where the budget decides",
                argument=(name, "keep"),
            )
        if value is not None and not used:
            raise OptionError(
                f"{name}= has no effect with score={score!r}; leave it out", argument=name
            )


def splits_of(
    model: PreTrainedModel,
    score: str | ItemScore,
    search: Any,
    report: Any,
    delta: float | None,
    growth: float | None,
    tokenizer: Any,
    max_length: int,
) -> tuple[Scorer, tuple[Sequence[Any], Sequence[Any]]]:
    """Return the scorer, and the items of both splits."""
    if callable(score):
        for name, items in (("search", search), ("report", report)):
            if not isinstance(items, list | tuple):
                raise EvaluationError(
                    f"{name}= is a {type(items).__name__}; give a list of items", argument=name
                )
        return CallableScorer(score, delta), (search, report)
    if model_kind(model) != "causal":
        raise OptionError(
            f"score='perplexity' with a {type(model).__name__}; only causal language models have a "
            "perplexity: give a callable"
        )
    made = [examples_for(model, d, tokenizer, max_length=max_length) for d in (search, report)]
    scorer = PerplexityScorer(growth, padding_for(model, tokenizer, 1))
    return scorer, (made[0].items, made[1].items)


def matrices_of(
    model: PreTrainedModel, job: Job, candidates: Sequence[float], order: str
) -> list[MatrixRanks]:
    """Return the matrices in the order in which they are tried; skip other targets."""
    gauge, found, chosen = bool(job.request.options.get("gauge", True)), [], job.selection
    for target in list(chosen.targets):
        if not isinstance(target, MatrixTarget):
            chosen.targets.remove(target)
            chosen.skipped[target.name] = "a rank search replaces linear matrices only"
            continue
        biased = target.bias(model) is not None
        extra = target.shape[0] if job.request.measure.adds_bias and not biased else 0
        found.append(MatrixRanks.of(target, candidates, gauge=gauge, extra=extra))
    if not found:
        name, reason = next(iter(chosen.skipped.items()))
        raise TargetError(f"no target is left; {name}: {reason}")
    return found[::-1] if order == "reverse" else found
