"""The steps behind `tnlm.compress`: prepare, decide, fit, swap."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.allocation.uniform import decide, reprice
from tnlm.calibration.data import token_batches
from tnlm.calibration.metrics import Metric
from tnlm.calibration.statistics import Statistics, collect
from tnlm.errors import BudgetError, CalibrationError, OptionError, TargetError
from tnlm.integrations.huggingface import TnlmConfig, attach
from tnlm.layers.build import Entry
from tnlm.memory import release, unmap
from tnlm.planning import Plan
from tnlm.reporting import Report, with_errors
from tnlm.request import Request, make_request
from tnlm.surgery import Shelf, Swap, fit_target, install
from tnlm.targets import Selection, Selector, Target, check_model, check_weights, select

logger = logging.getLogger("tnlm")


@dataclass(frozen=True)
class Data:
    """Calibration data and how it is cut."""

    calibration: Any
    tokenizer: Any
    num_samples: int
    max_length: int
    cache_dir: str | Path | None
    seed: int


@dataclass
class Job:
    """A checked request on a model, with the data it needs."""

    request: Request
    selection: Selection
    statistics: Statistics | None
    seconds: dict[str, float]

    def metric(self, target: Target) -> Metric:
        """Return how the error of a target is measured."""
        return Metric() if self.statistics is None else self.statistics.metric(target.module)


def prepare(
    model: PreTrainedModel,
    request: Request,
    targets: Selector | None,
    ignore: Selector | None,
    data: Data,
    progress: bool,
) -> Job:
    """Check the model, choose targets, and gather statistics if the metric needs them."""
    check_model(model)
    _check_data(request, data)
    selection = select(model, request.scheme.targets if targets is None else targets, ignore)
    _check_kinds(request, selection)
    check_weights(model, selection.targets)
    start = time.perf_counter()
    statistics = None
    if request.metric != "identity":
        batches = token_batches(
            data.calibration,
            data.tokenizer,
            num_samples=data.num_samples,
            max_length=data.max_length,
            seed=data.seed,
        )
        release()
        modules = list(dict.fromkeys(target.module for target in selection.targets))
        statistics = collect(model, modules, batches, cache_dir=data.cache_dir, progress=progress)
        release()
    return Job(request, selection, statistics, {"calibrate": time.perf_counter() - start})


def _check_data(request: Request, data: Data) -> None:
    needed = request.metric != "identity"
    if needed and data.calibration is None:
        raise CalibrationError(
            f"scheme {request.scheme.name!r} with metric={request.metric!r} looks at data; pass "
            "calibration= (texts, a file, token ids) and tokenizer="
        )
    if not needed and data.calibration is not None:
        raise OptionError(
            f"calibration= has no effect on scheme {request.scheme.name!r} with metric='identity'; "
            "leave it out, or choose a scheme or metric that looks at data: svd-llm, metric='input'"
        )
    if not needed and data.cache_dir is not None:
        raise OptionError("cache_dir= keeps calibration statistics, but no calibration is used")


def _check_kinds(request: Request, selection: Selection) -> None:
    """Pass over targets that the format or the metric cannot serve."""
    allowed = request.structure.kinds
    for target in list(selection.targets):
        if target.kind not in allowed:
            reason = f"{request.structure.name} replaces {' and '.join(sorted(allowed))} only"
        elif target.kind == "embedding" and request.metric == "input":
            reason = "an embedding has no input to measure; use metric='identity'"
        else:
            continue
        selection.targets.remove(target)
        selection.skipped[target.name] = reason
    if not selection.targets:
        name, reason = next(iter(selection.skipped.items()))
        raise TargetError(f"no target is left for scheme {request.scheme.name!r}; {name}: {reason}")


def settle(model: PreTrainedModel, job: Job, *, predict: bool, progress: bool) -> Plan:
    """Choose the spec of every target."""
    start = time.perf_counter()
    request, chosen = job.request, job.selection.targets
    cost = model_cost(model)
    limits = request.limits(cost.params, sum(target.params for target in chosen))
    layers = []
    for target in tqdm(chosen, desc="planning", unit="matrix", disable=not progress):
        weight, metric = target.weight(model), job.metric(target)
        layers.append(decide(target, weight, metric, request.structure, limits, predict=predict))
    decided = Plan(
        request.scheme.name,
        request.metric,
        request.record(),
        tuple(layers),
        cost,
        job.selection.skipped,
    )
    _check_worth(decided, limits.keep)
    job.seconds["plan"] = time.perf_counter() - start
    return decided


def _check_worth(decided: Plan, keep: float) -> None:
    dense = [layer for layer in decided.layers if layer.format is None]
    if len(dense) == len(decided.layers):
        raise BudgetError(f"no matrix would shrink; {dense[0].name}: {dense[0].note}")
    achieved = decided.targets_after.params / decided.targets_before.params
    if dense and achieved > keep:
        logger.warning(
            "asked to keep %.3f of the targets, achieved %.3f: "
            "%d of %d matrices stay dense (%s: %s)",
            keep,
            achieved,
            len(dense),
            len(decided.layers),
            dense[0].name,
            dense[0].note,
        )
    if achieved < keep / 2 and not set(decided.request) & {"terms", "rank", "ranks", "tolerance"}:
        logger.warning(
            "asked to keep %.3f of the targets, achieved %.3f: larger factors would need more than "
            "max_macs=%s times the dense multiply-adds; raise max_macs= to allow them",
            keep,
            achieved,
            decided.request.get("max_macs", "inf"),
        )


def resume(model: PreTrainedModel, decided: Plan, data: Data, progress: bool) -> tuple[Plan, Job]:
    """Match a plan made earlier, and maybe changed by hand, with a model, and price it again.

    Raises:
        TargetError: if the model lacks a matrix of the plan, or has it in another shape.
        OptionError: if a matrix cannot have the format or spec that the plan gives it.
    """
    request = make_request(decided.scheme, metric=decided.metric, options={})
    wanted = {layer.name: layer.shape for layer in decided.layers}
    job = prepare(model, request, list(wanted), None, data, progress)
    found = {target.name: target for target in job.selection.targets}
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            has = found[name].shape if name in found else "no such matrix"
            raise TargetError(f"the plan has {name} of {shape}; the model has {has}")
    modules = {found[name].module for name in wanted}
    job.selection.targets = [t for t in found.values() if t.module in modules]
    for target in job.selection.targets:
        if target.name not in wanted:
            raise TargetError(
                f"the plan lacks {target.name}, a part of {target.module}, which is replaced as a "
                "whole; list it, with format null to leave it dense"
            )
    job.seconds["plan"] = 0.0
    layers = {layer.name: layer for layer in decided.layers}
    priced = tuple(reprice(t, t.weight(model), layers[t.name]) for t in job.selection.targets)
    return replace(decided, layers=priced, model=model_cost(model)), job


def carry_out(model: PreTrainedModel, job: Job, decided: Plan, progress: bool) -> PreTrainedModel:
    """Fit every matrix, then swap them all in; any failure leaves or restores the model."""
    start = time.perf_counter()
    errors: dict[str, float] = {}
    config = TnlmConfig(scheme=decided.scheme, options=decided.request)
    with Shelf() as shelf:
        entries = _fit(model, job, decided, shelf, errors, progress)
        if job.statistics is not None:
            job.statistics.forget()
        with Swap(model) as swap:
            for target in job.selection.targets:
                if target.name in entries:
                    swap.spill(target.module)
            unmap(model)
            release()
            for group in _by_module(job.selection.targets):
                if group[0].name in entries:
                    modules, tied = install(model, swap, group, entries, shelf)
                    config.modules.update(modules)
                    config.tied.update(tied)
            attach(model, config)
    job.seconds["fit"] = time.perf_counter() - start
    tokens = job.statistics.tokens if job.statistics else 0
    done = Report(with_errors(decided, errors), dict(job.seconds), tokens)
    model.tnlm_report = done  # type: ignore[assignment]
    return model


def _fit(
    model: PreTrainedModel,
    job: Job,
    decided: Plan,
    shelf: Shelf,
    errors: dict[str, float],
    progress: bool,
) -> dict[str, Entry]:
    """Put the fitted modules on the shelf; return their entries by target name."""
    layers = {layer.name: layer for layer in decided.layers}
    entries: dict[str, Entry] = {}
    with tqdm(total=len(layers), desc="fitting", unit="matrix", disable=not progress) as bar:
        for group in _by_module(job.selection.targets):
            bar.update(len(group))
            if all(layers[target.name].format is None for target in group):
                continue
            for target in group:
                name, weight, bias = target.name, target.weight(model), target.bias(model)
                entries[name], module, errors[name] = fit_target(
                    target, weight, bias, job.metric(target), layers[name]
                )
                shelf.put(name, module)
            release()
    return entries


def _by_module(targets: Sequence[Target]) -> Iterator[list[Target]]:
    for _, group in groupby(targets, key=lambda target: target.module):
        yield list(group)
