"""Budgets in time: what is predicted for a model's targets, and measured for the rest of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from tnlm.allocation.clock import Clock, Workload
from tnlm.compression.request import Request
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import BudgetError, ModelError, OptionError, TnlmError
from tnlm.layers.prices import Prices, own_prices, read_prices
from tnlm.parallel.workers import Workers
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target
from tnlm.tensors.network import Cost
from tnlm.utils.residency import offloaded

logger = logging.getLogger("tnlm")

CONTEXT, STEPS = 16, 4
"""Tokens before those that are decoded, and steps of a turn."""
LEAST, MOST, SECONDS = 3, 12, 5.0
"""Turns, of which the fastest counts: a machine's other work only adds. None starts after that."""
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot be run on token ids alone."""


def clock_of(
    model: PreTrainedModel, request: Request, targets: Sequence[Target], workers: Workers
) -> Clock | None:
    """Return what predicts the times of targets; None unless the budget is in time.

    All processes predict by the prices of the first.

    Raises:
        OptionError: if the targets differ in dtype or device, or the file of prices lacks them.
    """
    if request.workload is None:
        return None
    weights = [target.weight(model) for target in targets]
    kinds = {(weight.dtype, weight.device.type) for weight in weights}
    if len(kinds) > 1:
        words = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise OptionError(
            f"unit='time' with targets in {words}; choose targets of one dtype and device",
            argument=("unit", "targets"),
        )
    ((dtype, device),) = kinds
    if request.prices is not None:
        prices = read_prices(request.prices, dtype, device)
    else:
        prices = own_prices(dtype, device)
    prices = workers.gather(prices)[0]
    return Clock(prices, request.workload, weights[0].element_size())


def timed_model(
    model: PreTrainedModel, cost: Cost, targets: Cost, request: Request, clock: Clock | None
) -> Cost:
    """Return the cost of a model with its time: the targets' as predicted, the rest as measured.

    Raises:
        BudgetError: if the budget counts the whole model's time, which cannot be measured.
    """
    if clock is None:
        return cost
    if targets.time == 0:
        raise BudgetError(
            "unit='time', but the targets take none; use another unit, or add targets",
            argument=("unit", "targets"),
        )
    try:
        measured = round(1e9 * _measured(model, clock))
        return replace(cost, time=max(targets.time, measured))
    except (TnlmError, *FAILURES) as error:
        why = f"{type(error).__name__}: {error}"
    if request.keep is not None:
        raise BudgetError(
            f"keep={request.keep:g} counts the whole model's time, which cannot be measured: "
            f"{why}; use keep_targets",
            argument=("keep", "keep_targets"),
        )
    return cost


def _measured(model: PreTrainedModel, clock: Clock) -> float:
    """Return the seconds of one pass of the dense model."""
    # Imported where it is needed, since compressing by another unit needs none of it.
    from tnlm.evaluation.mode import check_causal, check_positions, evaluating
    from tnlm.evaluation.speed import timed_decoding

    if not clock.prices.own:
        raise OptionError(f"the prices are those of {clock.prices.name}")
    if offloaded(model) is not None:
        raise ModelError("its weights are on disk")
    check_causal(model, "a pass")
    decodes = clock.workload.kind == "decode"
    shape = (clock.workload.tokens, CONTEXT) if decodes else (1, clock.workload.tokens)
    prompt = torch.zeros(shape, dtype=torch.int64)
    length = shape[1] + STEPS * decodes
    check_positions(model, length, f"a pass with {length} positions")
    times: list[float] = []
    start = time.perf_counter()
    with evaluating(model):
        while len(times) < LEAST or (len(times) < MOST and time.perf_counter() - start < SECONDS):
            first, steps = timed_decoding(model, prompt, STEPS if decodes else 0)
            times.append(steps / STEPS if decodes else first)
    return min(times)


def recorded(clock: Clock | None) -> dict[str, Any]:
    """Return what a plan records of the prices."""
    return {} if clock is None else {"prices": clock.prices.to_dict()}


def clock_again(request: Mapping[str, Any], itemsize: int) -> Clock | None:
    """Return the clock of an earlier plan, and warn if it is that of another machine.

    Raises:
        OptionError: if the plan's record of it is broken.
    """
    if request.get("unit") != "time":
        return None
    try:
        workload, prices = Workload.parse(request["workload"]), Prices.of(request["prices"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"the plan's prices cannot be read: {error}; make it again") from error
    if not prices.own:
        logger.warning(
            "the plan's times are those of %s, not of this machine with its %d threads; make it "
            "again for these",
            prices.name,
            torch.get_num_threads(),
        )
    return Clock(prices, workload, itemsize)


def with_times(clock: Clock | None, target: Target, layer: LayerPlan) -> LayerPlan:
    """Return a decision with predicted times, if there is a clock."""
    if clock is None:
        return layer
    network = None
    if layer.format is not None:
        structure = get_format(layer.format)
        spec = from_dict(structure.spec, layer.spec)
        network = target.taken(structure).network(target.shape, spec)
    before = clock.timed(layer.before, target)
    return replace(layer, before=before, after=clock.timed(layer.after, target, network))
