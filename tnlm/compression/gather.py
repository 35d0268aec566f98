"""Gathers the statistics that a request needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from tnlm.calibration.capacity import check_batches
from tnlm.calibration.data import fingerprint
from tnlm.calibration.pooling import lend
from tnlm.compression.choices import Calibration
from tnlm.compression.data import drawn, lessons, windows
from tnlm.compression.evidence import Evidence
from tnlm.compression.gatherers import gatherers
from tnlm.compression.gatherers.base import Found, Task
from tnlm.compression.request import Request
from tnlm.parallel.workers import Workers
from tnlm.targets.alike import alike
from tnlm.targets.base import Member
from tnlm.utils.memory import release

logger = logging.getLogger("tnlm")

UNREACHED = "the data never reaches it: it is not called, or no token is sent there"
"""Why a matrix stays dense: another module may read its weight, no token may be routed to its
expert, or it may belong to an image tower while the data is text."""


def gather(
    model: PreTrainedModel,
    request: Request,
    targets: Sequence[Member],
    data: Calibration,
    progress: bool,
    workers: Workers,
) -> Evidence:
    """Gather the statistics that a request needs, and the data for its later steps."""
    start = time.perf_counter()
    batches = windows(data, model)
    check_batches(model, batches)
    release()
    practice = lessons(data, model, request) if request.trains else []
    check_batches(model, practice)
    known = Evidence(
        request.measure,
        request.damping,
        batches=batches if request.cascade != "none" or request.refines else [],
        lessons=practice,
        drawn=drawn(data, request.training),
        fingerprint=fingerprint([*batches, *practice]),
        device=model.device,
    )
    workers.check_same(data=known.fingerprint)
    task = Task(
        model,
        targets,
        batches,
        practice,
        request.recover_tokens,
        data,
        progress and workers.rank == 0,
        request,
        workers,
    )
    for gatherer in gatherers():
        if gatherer.name not in request.needs:
            continue
        found = gatherer(task, **request.measure.gathering.get(gatherer.name, {}))
        known.add(gatherer, found)
        task = replace(
            task,
            model=found.model or task.model,
            targets=_reached(task, found, known),
            earlier={**task.earlier, gatherer.name: found},
        )
        if found.model is not None:
            known.seconds["prune" if gatherer.first else "train"] = time.perf_counter() - start
    _warn_of_few(known, len(targets))
    release()
    known.seconds["calibrate"] = time.perf_counter() - start - sum(known.seconds.values())
    return known


def _reached(task: Task, found: Found, known: Evidence) -> Sequence[Member]:
    """Return the targets that data reaches, and record the others as skipped."""
    if found.store is None:
        return task.targets
    units = [unit for unit in alike(task.model, task.targets) if len(unit.alike) > 1]
    groups = [[member.module for member in unit.members] for unit in units]
    known.borrowed |= dict.fromkeys(lend(found.store, groups))
    leaders = found.store.leaders
    gone = [target for target in task.targets if target.module not in leaders]
    known.skipped |= {target.name: UNREACHED for target in gone}
    return [target for target in task.targets if target.module in leaders]


def _warn_of_few(known: Evidence, before: int) -> None:
    """Warn of matrices that no token reaches, or so few that they borrow from other experts."""
    gone = list(known.skipped)
    if gone:
        logger.warning(
            "%d of %d matrices stay dense, as %s: %s",
            len(gone),
            before,
            UNREACHED,
            ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else ""),
        )
    if known.borrowed:
        logger.warning(
            "%d matrices of experts are reached by fewer tokens than they have columns, and borrow "
            "what they lack from the other experts of their layer (%s); use more text",
            len(known.borrowed),
            ", ".join(list(known.borrowed)[:3]) + (", ..." if len(known.borrowed) > 3 else ""),
        )
