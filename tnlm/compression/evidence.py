"""Evidence from data: how to measure the errors of a model's matrices, and how they affect it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.store import Statistics
from tnlm.compression.gatherers.base import Found, Gatherer
from tnlm.errors import CalibrationError
from tnlm.metrics.measure import INPUTS, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.metrics.stacked import UNSEEN, scaled
from tnlm.targets.base import Member, Target


@dataclass
class Evidence:
    """Statistics gathered from data, and the data that later steps need.

    Attributes:
        measure: how errors are measured.
        damping: fraction of a second moment replaced by its mean diagonal.
        sources: the gathered statistics, by name.
        source: the pruned copy whose weights are fitted instead of the model's own, if any.
        batches: calibration data for later steps; empty if none needs it.
        lessons: training data; empty if none is needed.
        drawn: the arguments by which data was drawn; empty if no data was used.
        fingerprint: hash of the tokens drawn.
        skipped: matrices that no data reaches, with the reason.
        borrowed: modules of experts that few tokens reach, and that use the statistics of others.
        seconds: wall time by stage.
        device: where the weights are, to which statistics are moved; None for no move.
    """

    measure: Measure
    damping: float
    sources: dict[str, Found] = field(default_factory=dict)
    source: PreTrainedModel | None = None
    batches: Sequence[Batch] = ()
    lessons: Sequence[Batch] = ()
    drawn: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    borrowed: dict[str, None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    device: torch.device | None = None
    _latest: tuple[str, Metric] | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """The number of tokens in the input statistics."""
        return self.inputs.tokens if self.inputs else 0

    @property
    def inputs(self) -> Statistics | None:
        """Statistics of the matrices' inputs, if they were gathered."""
        return self.sources["moment"].store if "moment" in self.sources else None

    @property
    def weighs_loss(self) -> bool:
        """Whether gradients were gathered."""
        return bool(self.sources.keys() & {"gradient", "fisher"})

    def add(self, gatherer: Gatherer, found: Found) -> None:
        """Add what a gatherer found."""
        self.sources.update(dict.fromkeys(gatherer.statistics, found))
        self.source = found.model or self.source

    def weights_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model whose weights are fitted: the one given, or its pruned copy."""
        return model if self.source is None else self.source

    def metric(self, target: Target, newer: Mapping[str, Tensor] | None = None) -> Metric:
        """Return the metric for the error of a target.

        Args:
            target: the matrix.
            newer: statistics that replace those of the dense model.
        """
        if target.unmeasured_by(self.measure):
            return Metric()
        if len(target.alike) > 1:
            parts = [partial(self.metric, one) for one in target.alike]
            return Several(parts, self._scales(target.alike))
        return target.metric(partial(self._within, self._effects(target), newer))

    def _within(
        self, effects: Mapping[str, float], newer: Mapping[str, Tensor] | None, measured: Target
    ) -> Metric:
        """Return the metric of a matrix in a target, by its effect on the loss if they add up."""
        effect = effects.get(measured.name, 1.0)
        return scaled(self._measured(measured, newer), effect, measured.shape[0])

    def _effects(self, target: Target) -> dict[str, float]:
        """Return how much an error of each matrix affects the loss, at most 1, if errors add up."""
        if not target.adds_up or not self.weighs_loss:
            return {}
        effects = {member.name: self.importance(member) for member in target.members}
        largest = max(effects.values()) or 1.0
        return {name: max(effect / largest, UNSEEN) for name, effect in effects.items()}

    def _scales(self, targets: Sequence[Target]) -> list[float]:
        """Return how much a squared error of each target counts: by the loss, or by its tokens."""
        if self.weighs_loss:
            scales = [self.importance(target) for target in targets]
        elif self.inputs is not None:
            counts = [self.inputs.count(target.measured.module) for target in targets]
            scales = [max(count, 1) / max(self.tokens, 1) for count in counts]
        else:
            scales = []
        return scales if any(scales) else [1.0] * len(targets)

    def _measured(self, target: Target, newer: Mapping[str, Tensor] | None) -> Metric:
        def gathered(name: str) -> Tensor:
            found = newer.get(name) if newer else None
            return self.statistic(target, name) if found is None else found.to(self.device)

        if newer is not None or self.measure.needs != {INPUTS} or self.inputs is None:
            return self.measure.build(gathered, self.damping)
        group = target.input_group(self.inputs.leaders)
        if self._latest is None or self._latest[0] != group:
            self._latest = None  # free the last one before the next is made
            self._latest = group, self.measure.build(gathered, self.damping)
        return self._latest[1]

    def importance(self, target: Target) -> float:
        """Return how much a unit of a target's squared error, in its metric, affects the loss.

        If the data shows no effect, the importance is 0, and the metric weights all directions
        equally.
        """
        if not self.weighs_loss:
            return 1.0
        if len(target.alike) > 1:  # in its metric already
            return float(any(self.importance(one) for one in target.alike))
        if target.adds_up:
            return max(self.importance(member) for member in target.members)
        return self.measure.importance(partial(self.statistic, target.measured))

    def forget(self) -> None:
        """Drop the latest metric from memory."""
        self._latest = None

    def statistic(self, target: Target, name: str) -> Tensor:
        """Return a statistic of a target.

        Raises:
            CalibrationError: if it was not gathered.
        """
        return target.statistic(name, self._read)

    def _read(self, target: Member, name: str) -> Tensor:
        if name not in self.sources:
            raise CalibrationError(f"{name} of {target.name} was not gathered")
        return self.sources[name].read(target, name).to(self.device)
