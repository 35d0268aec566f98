"""What a job learns from data: statistics, and a pruned copy of the model where that is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from tnlm.calibration.cache import check_cache
from tnlm.calibration.data import Batch, fingerprint, token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.lora import lora_statistics
from tnlm.calibration.measures import FISHER, GRADIENTS, INPUTS, LORA, MOVEMENT
from tnlm.calibration.movement import column_weights
from tnlm.calibration.statistics import collect
from tnlm.errors import CalibrationError, OptionError
from tnlm.memory import release
from tnlm.recovery.after import as_lessons
from tnlm.request import Request

if TYPE_CHECKING:
    from tnlm.job import Job


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

    def drawn(self) -> dict[str, int]:
        """Return the arguments that say which of the data is used."""
        names = ("num_samples", "max_length", "gradient_samples", "seed")
        return {name: getattr(self, name) for name in names}


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
    if not request.looks_at_data and data.cache_dir is not None:
        raise OptionError("cache_dir= keeps calibration statistics, but no calibration is used")
    if request.needs == {MOVEMENT} and data.cache_dir is not None:
        raise OptionError(
            f"cache_dir= keeps calibration statistics; metric={metric!r} trains, and keeps none"
        )
    if data.cache_dir is not None:
        check_cache(data.cache_dir)
    if not request.trains and data.training is not None:
        raise OptionError("training= has no effect without recover=; leave it out")
    samples = data.gradient_samples
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise OptionError(f"gradient_samples={samples!r}; allowed: a number >= 1")


def gather(model: PreTrainedModel, job: Job, data: Data, progress: bool) -> None:
    """Gather the statistics that a job needs, and the data that its later steps do."""
    batches = _windows(data)
    release()
    if job.request.trains:
        job.tokenizer, job.seed, job.lessons = data.tokenizer, data.seed, _lessons(job, data)
    job.drawn, job.fingerprint = data.drawn(), fingerprint([*batches, *job.lessons])
    needs = job.request.needs
    if MOVEMENT in needs:
        _prune(model, job, data, progress)
        model = job.weights_of(model)
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
            outputs=job.request.measure.name == "lora-both",
            cache_dir=data.cache_dir,
            progress=progress,
        )
    if job.request.cascade != "none" or job.request.refine:
        job.batches = batches
    release()


def _windows(data: Data) -> list[Batch]:
    """Return the sequences that statistics are taken of."""
    if data.calibration is None:
        return []
    return token_batches(
        data.calibration,
        data.tokenizer,
        num_samples=data.num_samples,
        max_length=data.max_length,
        seed=data.seed,
    )


def _lessons(job: Job, data: Data) -> list[Batch]:
    """Return the sequences that anything is trained on."""
    return token_batches(
        data.calibration if data.training is None else data.training,
        data.tokenizer,
        num_samples=max(1, -(-job.request.recover_tokens // data.max_length)),
        max_length=data.max_length,
        seed=data.seed,
    )


def _prune(model: PreTrainedModel, job: Job, data: Data, progress: bool) -> None:
    """Train and prune a copy of the model, which is then what is fitted."""
    # The trainer takes longer to import than all the rest.
    from tnlm.recovery.movement import movement_prune

    start = time.perf_counter()
    lessons = as_lessons(job.lessons, job.request.recover_tokens)
    found = movement_prune(
        model,
        lessons.pop("data"),
        job.selection.targets,
        tokenizer=data.tokenizer,
        seed=data.seed,
        progress=progress,
        **lessons,
    )
    job.source = found.model
    job.movement = {
        name: column_weights(scores, found.masks[name]) for name, scores in found.scores.items()
    }
    job.seconds["prune"] = time.perf_counter() - start
