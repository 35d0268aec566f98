"""A plan that was made earlier, possibly edited by hand, in place of a scheme."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from tnlm.allocation import get_allocation
from tnlm.allocation.bits import repriced, stored
from tnlm.allocation.pricing import model_cost
from tnlm.compression.checked_plan import check_packed
from tnlm.compression.choices import Asked, Recovery, choices_of, gather_choices
from tnlm.compression.clocked import clock_again, with_times
from tnlm.compression.covered import with_coverage
from tnlm.compression.data import LORA_OPTIONS
from tnlm.compression.job import Job
from tnlm.compression.rules import check_refine, refinement_asked
from tnlm.errors import OptionError, TargetError, did_you_mean
from tnlm.plans.plan import Plan
from tnlm.precision.grid import Precision, precision_of
from tnlm.schemes import get_scheme
from tnlm.targets.base import Selector

logger = logging.getLogger("tnlm")

RESUMED = (
    "split",
    "cascade",
    "anchor",
    "damping",
    "refine",
    "refine_passes",
    "recover_tokens",
    "portable",
    *LORA_OPTIONS,
)
"""Keywords that a plan records and that carrying it out needs again."""


def check_alone(given: Mapping[str, Any], *chosen: Selector | None) -> None:
    """Raise `OptionError` if more than data and bits is given with a plan, which has the rest."""
    about_data = {each.keyword for each in choices_of("calibration")} | {"training"}
    allowed = about_data | {"precision", "group"}
    others = [name for name, value in given.items() if value is not None and name not in allowed]
    if others or any(each is not None for each in chosen):
        hint = f": {others[0]}={did_you_mean(others[0], allowed)}" if others else ""
        raise OptionError(
            "a plan already holds targets, budget and options; give it alone, or with data, "
            f"precision and group{hint}"
        )


def asked_of(decided: Plan, data: Mapping[str, Any]) -> Asked:
    """Return the arguments of a call that carries out a plan with some data.

    Raises:
        OptionError: if the data does not fit the plan, or its matrices cannot have these bits.
    """
    _check_bits(decided, data.get("precision"), data.get("group"))
    _check_refined(decided, data.get("precision"))
    made_by = get_allocation(decided.request.get("allocation", "uniform"))
    choices = {
        "metric": decided.metric,
        "allocation": "uniform",  # already decided, so no gradients are needed
        "share": decided.request.get("share", 1),
        "recover": decided.request.get("recover", "none"),
        "unit": "params",
        "precision": "int8" if _in_bits(decided) else None,  # layers have their own
        **{name: decided.request.get(name) for name in (*RESUMED, *made_by.repeats)},
    }
    given = {name: value for name, value in data.items() if value is not None}
    return gather_choices(decided.scheme, {**choices, **given})


def grid_of(given: Mapping[str, Any]) -> Precision | None:
    """Return the grid on which a plan's matrices are to be stored, if one is given with it.

    Raises:
        OptionError: if the precision is unknown; ``"auto"`` is chosen by planning only.

    Example:
        >>> grid_of({"precision": "int4", "group": 32})
        Precision(bits=4, group=32, symmetric=True)
    """
    name = given.get("precision")
    return None if name is None else precision_of(name, given.get("group"))


def names_of(decided: Plan) -> list[str]:
    """Return the names of the matrices in a plan.

    Example:
        >>> from tnlm.plans.plan import Cost
        >>> names_of(Plan("svd", "identity", {}, (), Cost(0, 0, 0)))
        []
    """
    return list(kinds_of(decided))


def kinds_of(decided: Plan) -> dict[str, str]:
    """Return the kind of target that replaces each matrix in a plan, by the matrix's name."""
    return {name: layer.kind for layer in decided.layers for name in layer.name.split("+")}


def matched(model: PreTrainedModel, job: Job, decided: Plan, grid: Precision | None = None) -> Plan:
    """Return a plan with the costs of a model, and restrict the job to its matrices.

    Args:
        model: holds the weights.
        job: made for the plan.
        decided: the plan.
        grid: how to store the matrices for which the plan says nothing.

    Raises:
        TargetError: if the model lacks a matrix of the plan, or has it in another shape.
        OptionError: if a matrix cannot have its format or spec from the plan.
    """
    wanted = {layer.name: layer.shape for layer in decided.layers}
    found = {target.name: target for target in (*job.units, *job.joint)}
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            has = found[name].shape if name in found else "no such matrix"
            why = "".join(f": {job.selection.skipped.get(part, '')}" for part in name.split("+"))
            raise TargetError(
                f"the plan has {name} of {shape}; the model has {has}{why.rstrip(': ')}"
            )
    chosen = [found[name] for name in wanted]
    modules = {member.module for unit in chosen for member in unit.members}
    job.selection.targets = [t for t in job.selection.targets if t.module in modules]
    job.seconds["plan"] = 0.0
    layers = {layer.name: layer for layer in decided.layers}
    read = job.evidence.weights_of(model)
    clock = clock_again(decided.request, chosen[0].weight(model).element_size())
    priced = [stored(t, repriced(t, t.weight(read), layers[t.name]), grid) for t in chosen]
    timed = tuple(with_times(clock, *pair) for pair in zip(chosen, priced, strict=True))
    cost = replace(model_cost(model), time=decided.model.time)
    bits = {} if grid is None else {"precision": grid.name, "group": grid.group}
    given = {name: value for name, value in bits.items() if value is not None}
    again = replace(decided, request={**decided.request, **given}, layers=timed, model=cost)
    check_packed(again, grid)
    return with_coverage(model, job.selection, again)


def _check_bits(decided: Plan, precision: str | None, group: int | None) -> None:
    """Raise `OptionError` unless bits given with a plan have an effect; warn of a part of it."""
    if precision is None:
        if group is not None:
            raise OptionError(f"group={group!r} has no effect without precision=", argument="group")
        return
    if decided.request.get("unit") == "time":
        raise OptionError(
            f"precision={precision!r} with a plan for unit='time', whose time in few bits is not "
            "predicted; leave out one",
            argument="precision",
        )
    done = [layer for layer in decided.layers if layer.precision is not None]
    if done and len(done) == len(decided.layers):
        raise OptionError(
            f"precision={precision!r} has no effect: every matrix of the plan has bits of its own, "
            f"such as {done[0].name}; leave it out, or change precision in the plan's layers",
            argument="precision",
        )
    if done:
        logger.warning(
            "%d of %d matrices have bits in the plan and keep them, %s first; precision=%r is for "
            "the others",
            len(done),
            len(decided.layers),
            done[0].name,
            precision,
        )


def _check_refined(decided: Plan, precision: str | None) -> None:
    """Raise `OptionError` if blocks are to be refined, but weights are stored as codes."""
    given = Recovery(**{name: decided.request.get(name) for name in ("refine", "refine_passes")})
    asked = refinement_asked(*check_refine(given, get_scheme(decided.scheme).refine_passes))
    if asked and (precision is not None or _in_bits(decided)):
        stored = "bits in its layers" if precision is None else f"precision={precision!r}"
        raise OptionError(
            f"a plan with {asked} and {stored}, but codes cannot be tuned; make the plan with "
            "refine=0, or leave the bits out",
            argument="precision",
        )


def _in_bits(decided: Plan) -> bool:
    """Return whether a plan has codes, or its scheme always has."""
    packed = any(layer.precision is not None for layer in decided.layers)
    return packed or get_scheme(decided.scheme).precision is not None
