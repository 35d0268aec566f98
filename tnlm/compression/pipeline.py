"""The steps behind `tnlm.compress`: prepare, decide, fit, swap."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.allocation.base import Problem
from tnlm.allocation.bits import all_on_grid
from tnlm.allocation.pricing import model_cost
from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.transformers_plugin import attach
from tnlm.compression.blind import warn_if_blind
from tnlm.compression.cascade import cascade
from tnlm.compression.checked_plan import check_packed, check_worth
from tnlm.compression.clocked import clock_of, recorded, timed_model
from tnlm.compression.covered import with_coverage
from tnlm.compression.data import lora_of
from tnlm.compression.earlier import asked_of, grid_of, kinds_of, matched
from tnlm.compression.fitting import Fitting, by_module
from tnlm.compression.folding import fold, unfold_for
from tnlm.compression.install import install, replace_norm
from tnlm.compression.job import Job, prepare
from tnlm.compression.refine import Refinement, refine
from tnlm.compression.request import request_of
from tnlm.compression.rules import NO_RECOVERY
from tnlm.layers.swap import Shelf, Swap
from tnlm.parallel.workers import ALONE, Workers
from tnlm.plans.plan import LayerPlan, Plan, total
from tnlm.plans.report import Report, with_errors
from tnlm.recovery.kinds import get_recovery
from tnlm.recovery.kinds.base import Practice, RecoveryKind
from tnlm.recovery.recover import as_lessons
from tnlm.targets.dropping import dropped
from tnlm.targets.stacks import tie
from tnlm.utils.memory import release, unmap
from tnlm.utils.undo import attempt

logger = logging.getLogger("tnlm")


def settle(
    model: PreTrainedModel,
    job: Job,
    *,
    predict: bool,
    progress: bool,
    choose: Callable[[Problem], list[LayerPlan]] | None = None,
) -> Plan:
    """Choose the spec of every target, and return the plan.

    Args:
        model: holds the weights.
        job: the request.
        predict: whether to compute errors even if no decision depends on them.
        progress: show a progress bar.
        choose: decides in place of the request's allocation.
    """
    start = time.perf_counter()
    request, units = job.request, job.units
    clock = clock_of(model, request, units, job.workers)
    dense = ((t, t.dense_cost(t.weight(model).element_size())) for t in units)
    part = total(cost if clock is None else clock.timed(cost, t) for t, cost in dense)
    cost = timed_model(model, model_cost(model), part, request, clock)
    cost = job.workers.gather(cost)[0]  # times differ between processes
    limits = request.limits(cost, part, clock)
    problem = Problem(
        job.evidence.weights_of(model),
        units,
        request.structures,
        job.evidence.metric,
        job.evidence.importance,
        limits,
        joint=job.joint,
        adds_bias=request.measure.adds_bias,
        predict=predict,
        progress=progress,
        grids=request.grids if request.allocation.chooses_bits else (None,),
        workers=job.workers,
    )
    chosen = (choose or request.allocation.allocate)(problem)
    decided = Plan(
        request.scheme.name,
        request.measure.name,
        {**job.chosen, **request.record(), **lora_of(job.data), **recorded(clock)},
        tuple(all_on_grid(problem, chosen, request.grid)),
        cost,
        job.selection.skipped,
    )
    check_worth(decided, limits)
    check_packed(decided, request.grid)
    warn_if_blind(model, job, decided)
    job.seconds["plan"] = time.perf_counter() - start
    return with_coverage(model, job.selection, decided)


def resume(
    model: PreTrainedModel,
    decided: Plan,
    data: Mapping[str, Any],
    progress: bool,
    workers: Workers = ALONE,
) -> tuple[Plan, Job]:
    """Match an earlier plan, possibly edited by hand, to a model, and update its costs.

    Raises:
        TargetError: if the model lacks a matrix of the plan, or has it in another shape.
        OptionError: if a matrix cannot have its format or spec from the plan.
    """
    asked = asked_of(decided, data)
    request = request_of(asked)
    unfold_for(model, request)
    kinds = kinds_of(decided)
    job = prepare(model, request, list(kinds), None, asked.calibration, progress, workers, kinds)
    return matched(model, job, decided, grid_of(data)), job


def carry_out(model: PreTrainedModel, job: Job, decided: Plan, progress: bool) -> PreTrainedModel:
    """Fit every matrix, then swap them all in; any failure leaves or restores the model."""
    start = time.perf_counter()
    config = TnlmConfig(scheme=decided.scheme, options=decided.request)
    config.modules.update(dropped(model))
    after = None if job.request.recover == NO_RECOVERY else get_recovery(job.request.recover)
    teacher = copy.deepcopy(model) if after is not None and after.needs_teacher else None
    read = job.evidence.weights_of(model)
    shelf = Shelf()
    fitting = Fitting(read, job, decided, shelf)
    fit_all(read, job, fitting, progress)
    job.evidence.forget()
    dense = _dense_weights(read, job, fitting) if after is not None and after.needs_dense else {}
    swap = Swap(model)

    def finish() -> PreTrainedModel:
        _swap_in(model, job, fitting, swap, shelf, config)
        if after is not None:
            _recover(model, job, after, teacher, dense, progress)
        spent = time.perf_counter() - start
        job.seconds["fit"] = spent - sum(job.seconds.get(k, 0.0) for k in ("refine", "recover"))
        report = report_of(job, with_errors(decided, fitting.reported))
        model.tnlm_report = report  # type: ignore[assignment]
        return model

    return attempt(finish, swap.undo)


def _swap_in(
    model: PreTrainedModel, job: Job, fitting: Fitting, swap: Swap, shelf: Shelf, config: TnlmConfig
) -> None:
    """Put all fitted modules into the model."""
    entries = fitting.entries
    for target in job.selection.targets:
        if target.name in entries:
            swap.spill(target.module)
    unmap(model)
    release()
    for group in by_module(job.selection.targets):
        if group[0].name in entries:
            modules, tied = install(model, swap, group, entries, shelf)
            config.modules.update(modules)
            config.tied.update(tied)
    for name, norm in fitting.norms.items():
        replace_norm(model, swap, name, norm)
    tie(model, fitting.ties)
    config.tied.update(fitting.ties)
    fold(model, config)
    attach(model, config)


def report_of(job: Job, done: Plan) -> Report:
    """Return the report of a plan that was carried out."""
    known = job.evidence
    return Report(
        done,
        dict(job.seconds),
        known.tokens,
        data=known.drawn,
        fingerprint=known.fingerprint,
        refined={name: (gain.before, gain.after) for name, gain in job.gains.items()},
    )


def _dense_weights(read: PreTrainedModel, job: Job, fitting: Fitting) -> dict[str, Tensor]:
    """Return the dense weights of the factorized layers."""
    alone = {m.name for unit in job.units if len(unit.alike) == 1 for m in unit.members}
    weights = {
        target.name: target.weight(read)
        for target in job.selection.targets
        if target.name in alone  # experts are put together
        and {"format", "order"} <= fitting.entries.get(target.name, {}).keys()
    }
    if job.evidence.source is not None:
        return weights
    return {name: weight.clone() for name, weight in weights.items()}  # the model's are freed


def _recover(
    model: PreTrainedModel,
    job: Job,
    after: RecoveryKind,
    teacher: PreTrainedModel | None,
    dense: Mapping[str, Tensor],
    progress: bool,
) -> None:
    start = time.perf_counter()
    lessons = as_lessons(job.evidence.lessons, job.request.recover_tokens)
    practice = Practice(
        lessons,
        teacher,
        dense,
        job.request.scheme.distillation,
        job.data.tokenizer,
        job.data.cut.seed,
        progress,
    )
    after.run(model, practice)
    job.seconds["recover"] = time.perf_counter() - start


def fit_all(
    model: PreTrainedModel,
    job: Job,
    fitting: Fitting,
    progress: bool,
    fitted: Callable[[], None] = lambda: None,
) -> None:
    """Fit every target of a plan, and refine the blocks if that is asked for.

    Args:
        model: holds the weights.
        job: the request.
        fitting: holds the results.
        progress: show progress bars.
        fitted: called after every fit; those of a cascade come block by block.
    """
    request, refinement = job.request, _refinement(job, fitting)
    if request.cascade != "none":
        cascade(
            model,
            job.selection.targets,
            job.evidence.batches,
            request.cascade,
            fitting.fit,
            anchor=request.anchor,
            tune=None if refinement is None else refinement.advance,
            centered=job.request.measure.adds_bias,
            wanted=fitting.shrinks,
            done=fitted,
            progress=progress,
        )
    left = [unit for unit in fitting.units if fitting.is_due(unit)]
    for _ in fitting.fit_all(left, "fitting" if progress else None):
        release()
        fitted()
    fitting.fit_beside()
    if refinement is None:
        return
    if request.cascade == "none":
        done = [each.module for each in job.selection.targets if each.name in fitting.entries]
        refine(model, sorted(set(done)), job.evidence.batches, refinement, progress=progress)
    job.gains.update(refinement.gains)
    job.seconds["refine"] = refinement.seconds
    refinement.warn()


def _refinement(job: Job, fitting: Fitting) -> Refinement | None:
    """Return what tunes blocks after they are fitted, or None if that is not asked for."""
    if not job.request.refines:
        return None
    return Refinement(
        job.request.refine,
        fitting.take,
        fitting.keep,
        passes=job.request.refine_passes,
        weigh=job.effect_root,
        seed=job.data.cut.seed,
    )
