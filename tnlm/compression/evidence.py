"""What a job learns from data: statistics, and a pruned copy of the model where that is asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from tnlm.calibration.cache import check_cache
from tnlm.calibration.capacity import check_batches
from tnlm.calibration.data import Batch, begins, fingerprint, token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.lora import lora_statistics
from tnlm.calibration.statistics import collect
from tnlm.calibration.text import AUTO
from tnlm.compression.request import Request
from tnlm.errors import CalibrationError, OptionError
from tnlm.metrics.named import FISHER, GRADIENTS, INPUTS, LORA, MOVEMENT
from tnlm.recovery.pruning.column_weights import column_weights
from tnlm.recovery.recover import as_lessons
from tnlm.utils.memory import release

if TYPE_CHECKING:
    from tnlm.compression.job import Job

logger = logging.getLogger("tnlm")

UNREACHED = "the data never reaches it: it is not called, or no token is sent there"
"""Why a matrix stays dense: its weight may be read by another module, it may be an expert that no
token chose, or stand in a tower for images where the data is text."""


DEFAULTS: Mapping[str, Any] = {
    "num_samples": 64,
    "max_length": 512,
    "seed": 0,
    "gradient_samples": 16,
    "bos": AUTO,
}
"""What stands for an argument that is not given."""


@dataclass(frozen=True)
class Data:
    """Calibration data and how it is cut; None stands for what is not given.

    Example:
        >>> Data([1, 2], seed=7).cut.seed, Data([1, 2]).cut.max_length
        (7, 512)
    """

    calibration: Any = None
    tokenizer: Any = None
    num_samples: int | None = None
    max_length: int | None = None
    cache_dir: str | Path | None = None
    seed: int | None = None
    gradient_samples: int | None = None
    training: Any = None
    bos: bool | str | None = None

    @property
    def cut(self) -> Cut:
        """How it is cut and drawn, with defaults for what is not given."""
        given = {name: getattr(self, name) for name in DEFAULTS}
        return Cut(**{**DEFAULTS, **{k: v for k, v in given.items() if v is not None}})

    def drawn(self) -> dict[str, int]:
        """Return the arguments that say which of the data is used."""
        names = ("num_samples", "max_length", "gradient_samples", "seed")
        found = {name: getattr(self.cut, name) for name in names}
        sources = (self.calibration, self.training)
        if any(begins(source, self.tokenizer, self.cut.bos) for source in sources):
            found["bos"] = True
        return found


@dataclass(frozen=True)
class Cut:
    """How data is cut and drawn: the arguments of `tnlm.compress` of the same names."""

    num_samples: int
    max_length: int
    seed: int
    gradient_samples: int
    bos: bool | str


def check_data(request: Request, data: Data) -> None:
    """Raise a `TnlmError` unless data is given where it is needed, and only there."""
    scheme, metric = request.scheme.name, request.measure.name
    given = data.calibration is not None or (data.training is not None and not request.measures)
    if not (given or request.measures or MOVEMENT in request.needs) and request.trains:
        raise CalibrationError(
            f"recover={request.recover!r} trains on data; pass training= or calibration= "
            "(texts, a file, token ids) and tokenizer="
        )
    if request.looks_at_data and not given:
        raise CalibrationError(
            f"scheme {scheme!r} with metric={metric!r} looks at data; pass "
            "calibration= (texts, a file, token ids) and tokenizer="
        )
    if not request.looks_at_data and data.calibration is not None:
        raise OptionError(
            f"calibration= has no effect on scheme {scheme!r} with metric='identity'; "
            "leave it out, or choose a scheme or metric that looks at data: svd-llm, metric='input'"
        )
    if request.needs == {MOVEMENT} and data.cache_dir is not None:
        raise OptionError(
            f"cache_dir= keeps calibration statistics; metric={metric!r} trains, and keeps none"
        )
    if data.cache_dir is not None:
        check_cache(data.cache_dir)
    if not request.trains and data.training is not None:
        raise OptionError("training= has no effect without recover=; leave it out")
    check_unused(request, data)
    samples = data.cut.gradient_samples
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise OptionError(f"gradient_samples={samples!r}; allowed: a number >= 1")


def check_unused(request: Request, data: Data) -> None:
    """Raise `OptionError` for an argument about data that is given, and none is looked at."""
    if request.looks_at_data:
        return
    for name in (*DEFAULTS, "tokenizer", "cache_dir"):
        if getattr(data, name) is not None:
            raise OptionError(
                f"{name}= has no effect on scheme {request.scheme.name!r} with "
                f"metric={request.measure.name!r}, which looks at no data; leave it out"
            )


def gather(model: PreTrainedModel, job: Job, data: Data, progress: bool) -> None:
    """Gather the statistics that a job needs, and the data that its later steps do."""
    batches = _windows(model, data)
    check_batches(model, batches)
    release()
    job.seed = data.cut.seed
    if job.request.trains:
        job.tokenizer, job.lessons = data.tokenizer, _lessons(model, job, data)
        check_batches(model, job.lessons)
    job.drawn, job.fingerprint = data.drawn(), fingerprint([*batches, *job.lessons])
    needs, before = job.request.needs, len(job.selection.targets)
    if MOVEMENT in needs:
        _prune(model, job, data, progress)
        model = job.weights_of(model)
    if INPUTS in needs:
        job.inputs = collect(
            model, _modules(job), batches, cache_dir=data.cache_dir, progress=progress
        )
        _pass_over(model, job, job.inputs.leaders)
    if needs & {GRADIENTS, FISHER}:
        job.gradients = collect_gradients(
            model,
            _modules(job),
            batches[: data.cut.gradient_samples],
            moment=_moment(job.request),
            fisher=FISHER in needs,
            # FWSVD and TFWSVD take the data's own labels; K-FAC the model's.
            labels="data" if FISHER in needs else "sampled",
            seed=data.cut.seed,
            cache_dir=data.cache_dir,
            progress=progress,
        )
        _pass_over(model, job, job.gradients.leaders)
    if LORA in needs:
        job.loras = lora_statistics(
            model,
            {target.module: len(target.parts) or 1 for target in job.selection.targets},
            batches[: data.cut.gradient_samples],
            kind="taylor" if job.request.measure.name == "lora-taylor" else "fisher",
            outputs=job.request.measure.name == "lora-both",
            seed=data.cut.seed,
            cache_dir=data.cache_dir,
            progress=progress,
        )
        _pass_over(model, job, job.loras.leaders)
    _warn(job, before)
    if job.request.cascade != "none" or job.request.refine:
        job.batches = batches
    release()


def _moment(request: Request) -> str:
    """Return how much of the moments of gradients is read: by the metric, or an allocation."""
    if GRADIENTS in request.measure.needs:
        return "full"
    return "diagonal" if GRADIENTS in request.needs else "none"


def _modules(job: Job) -> list[str]:
    return list(dict.fromkeys(target.module for target in job.selection.targets))


def _pass_over(model: PreTrainedModel, job: Job, reached: Collection[str]) -> None:
    """Leave the targets dense of whose modules the data says nothing."""
    gone = [target for target in job.selection.targets if target.module not in reached]
    if gone:
        job.selection.skipped |= {target.name: UNREACHED for target in gone}
        job.settle_on([t for t in job.selection.targets if t.module in reached], model)


def _warn(job: Job, before: int) -> None:
    gone = [name for name, reason in job.selection.skipped.items() if reason == UNREACHED]
    if gone:
        logger.warning(
            "%d of %d matrices stay dense, as %s: %s",
            len(gone),
            before,
            UNREACHED,
            ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else ""),
        )


def _windows(model: PreTrainedModel, data: Data) -> list[Batch]:
    """Return the sequences that statistics are taken of."""
    if data.calibration is None:
        return []
    return token_batches(
        data.calibration,
        data.tokenizer,
        num_samples=data.cut.num_samples,
        max_length=data.cut.max_length,
        seed=data.cut.seed,
        bos=data.cut.bos,
        model=model,
    )


def _lessons(model: PreTrainedModel, job: Job, data: Data) -> list[Batch]:
    """Return the sequences that anything is trained on."""
    return token_batches(
        data.calibration if data.training is None else data.training,
        data.tokenizer,
        num_samples=max(1, -(-job.request.recover_tokens // data.cut.max_length)),
        max_length=data.cut.max_length,
        seed=data.cut.seed,
        bos=data.cut.bos,
        model=model,
    )


def _prune(model: PreTrainedModel, job: Job, data: Data, progress: bool) -> None:
    """Train and prune a copy of the model, which is then what is fitted."""
    # The trainer takes longer to import than all the rest.
    from tnlm.recovery.pruning.movement import movement_prune

    start = time.perf_counter()
    lessons = as_lessons(job.lessons, job.request.recover_tokens)
    found = movement_prune(
        model,
        lessons.pop("data"),
        job.selection.targets,
        tokenizer=data.tokenizer,
        seed=data.cut.seed,
        progress=progress,
        **lessons,
    )
    job.source = found.model
    job.movement = {
        name: column_weights(scores, found.masks[name]) for name, scores in found.scores.items()
    }
    moved = {t.module for t in job.selection.targets if bool(found.scores[t.name].any())}
    if not moved:
        raise CalibrationError("training moves none of the matrices; choose other targets")
    _pass_over(model, job, moved)
    job.seconds["prune"] = time.perf_counter() - start
