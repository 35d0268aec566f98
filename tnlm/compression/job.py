"""A checked request for a model, with the evidence from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.compression.choices import Calibration
from tnlm.compression.data import check_data, data_for
from tnlm.compression.evidence import Evidence
from tnlm.compression.gather import gather
from tnlm.compression.request import Request
from tnlm.compression.tuning import Gain
from tnlm.errors import TargetError
from tnlm.metrics.measure import FISHER, GRADIENTS
from tnlm.parallel.workers import ALONE, Workers
from tnlm.targets import joint_targets, usable_targets
from tnlm.targets.alike import alike
from tnlm.targets.base import Fitted, Selector, Target
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.selection import Selection, select
from tnlm.targets.stacks import stack


@dataclass(frozen=True)
class Job:
    """A checked request for a model.

    Attributes:
        request: the request.
        selection: the chosen matrices.
        units: the targets planned and fitted one by one: matrices, or stacks of them.
        groups: targets that could replace several matrices, such as feed-forward layers.
        joint: the groups that the request's formats can replace.
        evidence: statistics from data.
        data: the calibration data.
        chosen: ``targets`` and ``ignore``, if given as strings.
        seconds: wall time by stage.
        gains: the errors of refined blocks before and after, by block.
        ready: fits done already, by target name.
        workers: share out the work.
    """

    request: Request
    selection: Selection
    units: Sequence[Target]
    groups: Sequence[Target]
    joint: Sequence[Target]
    evidence: Evidence
    data: Calibration = field(default_factory=Calibration)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gains: dict[str, Gain] = field(default_factory=dict)
    ready: Mapping[str, Fitted] = field(default_factory=dict)
    workers: Workers = ALONE

    def effect_root(self, block: str) -> Tensor | None:
        """Return the root of the metric for errors of a block's output, or None if unknown.

        A block's last addition to the residual stream has the same gradient as the stream.
        """
        for group in self.groups:
            last = group.ends_block and len(group.alike) == 1
            if last and group.module.startswith(block + ".") and self.evidence.weighs_loss:
                side = self.evidence.metric(group.measured).outputs
                return None if side is None or side.is_diagonal else side.root
        return None


def prepare(
    model: PreTrainedModel,
    request: Request,
    targets: Selector | None,
    ignore: Selector | None,
    data: Calibration,
    progress: bool,
    workers: Workers = ALONE,
    planned: Mapping[str, str] | None = None,
) -> Job:
    """Check the model, choose targets, and gather the statistics that the request needs.

    The kind of target that replaces each matrix is chosen freely, or as ``planned`` by its name.
    """
    check_model(model)
    data = data_for(request, data)
    check_data(request, data)
    workers.check_same(scheme=request.scheme.name, request=request.record())
    chosen = request.scheme.targets if targets is None else targets
    selection = select(model, chosen, ignore, split=request.scheme.split)
    names = [target.name for target in selection.targets]
    cached = data.cache_dir is not None
    workers.check_same(targets=names, **asdict(data.cut), cache_dir=cached)
    _check_kinds(model, request, selection)
    check_weights(model, selection.targets)
    groups = joint_targets(model, selection.targets, _group_kinds(request))
    usable = alike(model, usable_targets(model, groups, request.kinds, planned))
    evidence = Evidence(request.measure, request.damping)
    if request.looks_at_data:
        measured = [
            target for target in selection.targets if not target.unmeasured_by(request.measure)
        ]
        evidence = gather(model, request, measured, data, progress, workers)
    reached = [target for target in selection.targets if target.name not in evidence.skipped]
    known = {target.name for target in reached}
    groups = [each for each in groups if all(member.name in known for member in each.members)]
    groups = alike(model, groups)
    whole = {group.name for group in groups}
    return Job(
        request,
        replace(selection, targets=reached, skipped={**selection.skipped, **evidence.skipped}),
        stack(alike(model, reached), request.share),
        groups,
        [each for each in usable if each.name in whole],
        evidence,
        data,
        _in_words(targets=targets, ignore=ignore),
        {**evidence.seconds} or {"calibrate": 0.0},
        workers=workers,
    )


def _group_kinds(request: Request) -> Set[str] | None:
    """Return the kinds of joint targets that matter: all (None) if the loss weights errors."""
    return None if request.needs & {GRADIENTS, FISHER} else request.kinds


def _in_words(**given: Selector | None) -> dict[str, Any]:
    """Return the selectors given as strings; classes cannot be saved."""
    return {
        name: selector if isinstance(selector, str) else list(selector)
        for name, selector in given.items()
        if isinstance(selector, Sequence) and all(isinstance(word, str) for word in selector)
    }


def _check_kinds(model: PreTrainedModel, request: Request, selection: Selection) -> None:
    """Skip targets that the formats or the metric do not support, or that fail their trial."""
    allowed = request.kinds
    for target in list(selection.targets):
        unmeasured = target.unmeasured_by(request.measure)
        if target.kinds.isdisjoint(allowed):
            formats = " or ".join(structure.name for structure in request.structures)
            names = formats or f"scheme {request.scheme.name!r}"
            reason = f"{names} replaces only {' and '.join(sorted(allowed))}"
        elif unmeasured and request.looks_at_data and not request.rounds_unmeasured:
            reason = unmeasured
        else:
            found = target.tried(model)
            if not isinstance(found, str):
                selection.targets[selection.targets.index(target)] = found
                continue
            reason = found
        selection.targets.remove(target)
        selection.skipped[target.name] = reason
    if not selection.targets:
        name, reason = next(iter(selection.skipped.items()))
        raise TargetError(f"no target is left for scheme {request.scheme.name!r}; {name}: {reason}")
