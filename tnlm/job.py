"""A checked request on a model, with the statistics that it needs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.lora import lora_statistics
from tnlm.calibration.measures import FISHER, GRADIENTS, INPUTS, LORA
from tnlm.calibration.metrics import Metric
from tnlm.calibration.statistics import collect
from tnlm.calibration.store import Statistics
from tnlm.errors import CalibrationError, OptionError, TargetError
from tnlm.feed_forward import FeedForward, pairs
from tnlm.layers.build import Entry
from tnlm.memory import release
from tnlm.request import Request
from tnlm.stacks import Stack, stack
from tnlm.targets import Selection, Selector, Target, check_model, check_weights, select


@dataclass(frozen=True)
class Data:
    """Calibration data and how it is cut."""

    calibration: Any
    tokenizer: Any
    num_samples: int
    max_length: int
    cache_dir: str | Path | None
    seed: int
    gradient_samples: int = 16
    training: Any = None


@dataclass
class Job:
    """A checked request on a model, with the data it needs.

    Attributes:
        request: what is asked.
        selection: the matrices.
        units: what is decided and fitted as one: the matrices, or stacks of them.
        pairs: feed-forward pairs among the matrices.
        batches: calibration data, empty if none is needed.
        lessons: training data, empty if none is needed.
        tokenizer: the user's, if given.
        inputs: statistics of the matrices' inputs, if needed.
        gradients: statistics of gradients, if needed.
        loras: statistics of the gradients of a LoRA, if needed.
        seconds: wall time by stage.
        ready: what `tnlm.surgery.fit_target` gave for matrices that were fitted already, by name.
    """

    request: Request
    selection: Selection
    units: Sequence[Target] = ()
    pairs: Sequence[FeedForward] = ()
    batches: Sequence[Batch] = ()
    lessons: Sequence[Batch] = ()
    tokenizer: Any = None
    inputs: Statistics | None = None
    gradients: Statistics | None = None
    loras: Statistics | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ready: dict[str, tuple[Entry, nn.Module, float]] = field(default_factory=dict)
    _latest: tuple[str, Metric] | None = None

    @property
    def joint(self) -> Sequence[FeedForward]:
        """What may take the place of several matrices: pairs, if channels may be dropped."""
        drops = any("channels" in structure.kinds for structure in self.request.structures)
        return self.pairs if drops else ()

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
        gradient = float(self._statistic(target, "gradient").diagonal().mean())
        moment = float(self._statistic(target, "moment").diagonal().mean())
        if GRADIENTS in measure.needs:
            return float(gradient * moment > 0)
        return gradient * moment / self._scale(target, moment) if moment > 0 else 0.0

    def _scale(self, target: Target, moment: float) -> float:
        """Return how the metric weighs a column on average."""
        if not self.request.measure.needs:
            return 1.0
        if LORA in self.request.measure.needs:
            return float(self._statistic(target, "lora_inputs").mean()) or math.inf
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
        stores = {"gradient": self.gradients, "fisher": self.gradients}
        stores |= {"lora_inputs": self.loras, "lora_outputs": self.loras}
        store = stores.get(name, self.inputs)
        if store is None:
            raise CalibrationError(f"{name} of {target.name} was not gathered")
        tensor = store.tensor(target.module, name)
        rows = slice(target.part * target.shape[0], (target.part + 1) * target.shape[0])
        if name == "gradient":
            return tensor[rows, rows]
        if name == "lora_inputs" and target.parts:
            return tensor[target.part]
        return tensor[rows] if name in ("fisher", "lora_outputs") else tensor


def _together(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return a statistic of a stack: means of what concerns inputs, blocks of what outputs do."""
    if name == "gradient":
        blocks: Tensor = torch.block_diag(*parts)
        return blocks
    if name in ("fisher", "lora_outputs"):
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
    _check_data(request, data)
    selection = select(model, request.scheme.targets if targets is None else targets, ignore)
    _check_kinds(request, selection)
    check_weights(model, selection.targets)
    start = time.perf_counter()
    units = stack(selection.targets, request.share)
    job = Job(request, selection, units, pairs(model, selection.targets))
    if request.looks_at_data:
        _gather(model, job, data, progress)
    job.seconds["calibrate"] = time.perf_counter() - start
    return job


def _gather(model: PreTrainedModel, job: Job, data: Data, progress: bool) -> None:
    batches = token_batches(
        data.calibration,
        data.tokenizer,
        num_samples=data.num_samples,
        max_length=data.max_length,
        seed=data.seed,
    )
    release()
    needs = job.request.needs
    modules = list(dict.fromkeys(target.module for target in job.selection.targets))
    if INPUTS in needs:
        job.inputs = collect(model, modules, batches, cache_dir=data.cache_dir, progress=progress)
    if needs & {GRADIENTS, FISHER}:
        job.gradients = collect_gradients(
            model,
            modules,
            batches[: data.gradient_samples],
            fisher=FISHER in needs,
            # FWSVD and TFWSVD take the data's own labels; K-FAC the model's.
            labels="data" if FISHER in needs else "sampled",
            cache_dir=data.cache_dir,
            progress=progress,
        )
    if LORA in needs:
        job.loras = lora_statistics(
            model,
            {target.module: len(target.parts) or 1 for target in job.selection.targets},
            batches[: data.gradient_samples],
            kind="taylor" if job.request.measure.name == "lora-taylor" else "fisher",
            cache_dir=data.cache_dir,
            progress=progress,
        )
    if job.request.cascade != "none" or job.request.refine:
        job.batches = batches
    if job.request.recover != "none":
        job.tokenizer = data.tokenizer
        job.lessons = token_batches(
            data.calibration if data.training is None else data.training,
            data.tokenizer,
            num_samples=max(1, -(-job.request.recover_tokens // data.max_length)),
            max_length=data.max_length,
            seed=data.seed,
        )
    release()


def _check_data(request: Request, data: Data) -> None:
    scheme, metric = request.scheme.name, request.measure.name
    if request.looks_at_data and data.calibration is None:
        raise CalibrationError(
            f"scheme {scheme!r} with metric={metric!r} looks at data; pass "
            "calibration= (texts, a file, token ids) and tokenizer="
        )
    if not request.looks_at_data and data.calibration is not None:
        raise OptionError(
            f"calibration= has no effect on scheme {scheme!r} with metric='identity'; "
            "leave it out, or choose a scheme or metric that looks at data: svd-llm, metric='input'"
        )
    if not request.looks_at_data and data.cache_dir is not None:
        raise OptionError("cache_dir= keeps calibration statistics, but no calibration is used")
    if request.recover == "none" and data.training is not None:
        raise OptionError("training= has no effect without recover=; leave it out")
    samples = data.gradient_samples
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise OptionError(f"gradient_samples={samples!r}; allowed: a number >= 1")


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
