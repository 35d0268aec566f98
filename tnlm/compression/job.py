"""A checked request on a model, with the statistics that it needs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.store import Statistics
from tnlm.checkpoint.entries import Entry
from tnlm.compression.evidence import Data, check_data, gather
from tnlm.compression.request import Request
from tnlm.errors import CalibrationError, TargetError
from tnlm.metrics.metric import Metric
from tnlm.metrics.named import FISHER, GRADIENTS, INPUTS, LORA, MOVEMENT
from tnlm.targets.base import Selector, Target
from tnlm.targets.channels import FeedForward, narrowable, pairs
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.selection import Selection, select
from tnlm.targets.stacks import Stack, stack

__all__ = ["Data", "Job", "prepare"]


@dataclass
class Job:
    """A checked request on a model, with the data it needs.

    Attributes:
        request: what is asked.
        selection: the matrices.
        units: what is decided and fitted as one: the matrices, or stacks of them.
        pairs: feed-forward pairs among the matrices.
        joint: what may take the place of several matrices: pairs that may lose channels.
        batches: calibration data, empty if none is needed.
        lessons: training data, empty if none is needed.
        tokenizer: the user's, if given.
        seed: of all that is drawn.
        chosen: ``targets`` and ``ignore``, if they were given in words.
        drawn: the arguments by which data was drawn.
        fingerprint: of the tokens drawn.
        inputs: statistics of the matrices' inputs, if needed.
        gradients: statistics of gradients, if needed.
        loras: statistics of the gradients of a LoRA, if needed.
        movement: weights of columns by the target's name, if the model is pruned.
        source: the pruned copy, whose weights are fitted in place of the model's own.
        seconds: wall time by stage.
        ready: what `tnlm.compression.install.fit_target` gave for matrices that were fitted already, by name.
    """

    request: Request
    selection: Selection
    units: Sequence[Target] = ()
    pairs: Sequence[FeedForward] = ()
    joint: Sequence[FeedForward] = ()
    batches: Sequence[Batch] = ()
    lessons: Sequence[Batch] = ()
    tokenizer: Any = None
    seed: int = 0
    chosen: Mapping[str, Any] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    inputs: Statistics | None = None
    gradients: Statistics | None = None
    loras: Statistics | None = None
    movement: Mapping[str, Tensor] = field(default_factory=dict)
    source: PreTrainedModel | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ready: dict[str, tuple[Entry, nn.Module, float]] = field(default_factory=dict)
    _latest: tuple[str, Metric] | None = None

    def settle_on(self, targets: list[Target], model: PreTrainedModel) -> None:
        """Make these the matrices, in the stacks and pairs that they still form."""
        self.selection.targets = targets
        self.units = stack(targets, self.request.share)
        self.pairs = pairs(model, targets)
        names = {pair.name for pair in self.pairs}
        self.joint = [unit for unit in self.joint if unit.name in names]

    def weights_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model whose weights are fitted: the one given, or its pruned copy."""
        return model if self.source is None else self.source

    def metric(self, target: Target, newer: Mapping[str, Tensor] | None = None) -> Metric:
        """Return how the error of a target is measured.

        Args:
            target: the matrix.
            newer: statistics that take the place of those gathered from the dense model.
        """
        if isinstance(target, FeedForward):
            return self._channel_metric(target)
        measure, damping = self.request.measure, self.request.damping

        def gathered(name: str) -> Tensor:
            return newer[name] if newer and name in newer else self._statistic(target, name)

        if newer is not None or measure.needs != {INPUTS} or self.inputs is None:
            return measure.build(gathered, damping)
        leader = target.name if target.copies > 1 else self.inputs.leaders[target.module]
        if self._latest is None or self._latest[0] != leader:
            self._latest = None  # free the last one before the next is made
            self._latest = leader, measure.build(gathered, damping)
        return self._latest[1]

    def _channel_metric(self, target: FeedForward) -> Metric:
        """Weigh hidden channels by their second moment, and outputs as the reader's metric does."""
        reader = self.metric(target.reader)
        return Metric(reader.inputs, reader.outputs)

    def importance(self, target: Target) -> float:
        """Return the effect on the loss of a unit of a target's squared error in its metric.

        Where the data shows no effect at all the metric is even, as nothing is known of directions;
        the importance is then 0.
        """
        if isinstance(target, FeedForward):
            return self.importance(target.reader)
        measure = self.request.measure
        if self.gradients is None:
            return 1.0
        if FISHER in measure.needs:
            mean = float(self._statistic(target, "fisher").mean())
            # Element-wise weights are scaled to mean 1; the others are the effect itself.
            return mean if measure.is_elementwise else float(mean > 0)
        squares = self._statistic(target, "gradient")
        gradient = float((squares.diagonal() if squares.dim() == 2 else squares).mean())
        moment = float(self._statistic(target, "moment").diagonal().mean())
        if GRADIENTS in measure.needs:
            return float(gradient * moment > 0)
        return gradient * moment / self._scale(target, moment) if moment > 0 else 0.0

    def _scale(self, target: Target, moment: float) -> float:
        """Return how the metric weighs a column on average."""
        if not self.request.measure.needs or self.request.measure.name == "pruned":
            return 1.0
        for kind, name in ((LORA, "lora_inputs"), (MOVEMENT, "movement")):
            if kind in self.request.measure.needs:
                return float(self._statistic(target, name).mean()) or math.inf
        if self.request.measure.name == "diagonal":  # magnitudes, not their squares
            return float(self._statistic(target, "magnitude").mean())
        return moment

    def effect_root(self, block: str) -> Tensor | None:
        """Return the root of the form that measures how a block's output acts on the loss.

        What a block adds last to the residual stream has the gradient of the stream itself.
        """
        for pair in self.pairs:
            if pair.module.startswith(block + ".") and self.gradients is not None:
                side = self.metric(pair.reader).outputs
                return None if side is None or side.is_diagonal else side.root
        return None

    def forget(self) -> None:
        """Drop the latest metric from memory."""
        self._latest = None

    def _statistic(self, target: Target, name: str) -> Tensor:
        if isinstance(target, Stack):
            return _together(name, [self._statistic(member, name) for member in target.members])
        if name == "movement" and target.name in self.movement:
            return self.movement[target.name]
        stores = {"gradient": self.gradients, "fisher": self.gradients}
        stores |= {"lora_inputs": self.loras, "lora_outputs": self.loras}
        store = stores.get(name, self.inputs)
        if store is None:
            raise CalibrationError(f"{name} of {target.name} was not gathered")
        tensor = store.tensor(target.module, name)
        rows = slice(target.part * target.shape[0], (target.part + 1) * target.shape[0])
        if name == "gradient" and tensor.dim() == 2:
            return tensor[rows, rows]
        if name == "lora_inputs" and target.parts:
            return tensor[target.part]
        return tensor[rows] if name in ("gradient", "fisher", "lora_outputs") else tensor


def _together(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return a statistic of a stack: means of what concerns inputs, blocks of what outputs do."""
    if name == "gradient" and parts[0].dim() == 2:
        blocks: Tensor = torch.block_diag(*parts)
        return blocks
    if name in ("gradient", "fisher", "lora_outputs"):
        return torch.cat(list(parts))
    return torch.stack(list(parts)).mean(0)


def prepare(
    model: PreTrainedModel,
    request: Request,
    targets: Selector | None,
    ignore: Selector | None,
    data: Data,
    progress: bool,
) -> Job:
    """Check the model, choose targets, and gather the statistics that the request needs."""
    check_model(model)
    check_data(request, data)
    selection = select(model, request.scheme.targets if targets is None else targets, ignore)
    _check_kinds(request, selection)
    check_weights(model, selection.targets)
    start = time.perf_counter()
    job = Job(request, selection, chosen=_in_words(targets=targets, ignore=ignore))
    job.settle_on(selection.targets, model)
    if any("channels" in structure.kinds for structure in request.structures):
        job.joint = narrowable(model, job.pairs)
    if request.looks_at_data:
        gather(model, job, data, progress)
    job.seconds["calibrate"] = time.perf_counter() - start - job.seconds.get("prune", 0.0)
    return job


def _in_words(**given: Selector | None) -> dict[str, Any]:
    """Return the selectors that are words; classes cannot be written down."""
    return {
        name: selector if isinstance(selector, str) else list(selector)
        for name, selector in given.items()
        if isinstance(selector, Sequence) and all(isinstance(word, str) for word in selector)
    }


def _check_kinds(request: Request, selection: Selection) -> None:
    """Pass over targets that the formats or the metric cannot serve."""
    allowed = frozenset[str]().union(*(structure.kinds for structure in request.structures))
    if "channels" in allowed:  # made of linear targets
        allowed |= {"linear"}
    for target in list(selection.targets):
        if target.kind not in allowed:
            names = " or ".join(structure.name for structure in request.structures)
            reason = f"{names} replaces {' and '.join(sorted(allowed))} only"
        elif target.kind == "embedding" and request.looks_at_data:
            reason = "an embedding has no input to measure; use metric='identity'"
        else:
            continue
        selection.targets.remove(target)
        selection.skipped[target.name] = reason
    if not selection.targets:
        name, reason = next(iter(selection.skipped.items()))
        raise TargetError(f"no target is left for scheme {request.scheme.name!r}; {name}: {reason}")
