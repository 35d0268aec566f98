"""The data of a request, and checks that it fits."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.cache import check_cache
from tnlm.calibration.data import begins, token_batches
from tnlm.calibration.generated import SELF, is_self
from tnlm.calibration.inputs import TEXT
from tnlm.calibration.sequences import Batch
from tnlm.compression.choices import Calibration, choices_of
from tnlm.compression.request import Request
from tnlm.errors import CalibrationError, OptionError
from tnlm.metrics.measure import LORA, MOVEMENT
from tnlm.metrics.named.lora import KEPT
from tnlm.utils.checks import check_whole, is_real, is_whole

logger = logging.getLogger("tnlm")

LORA_OPTIONS = ("lora_rank", "lora_steps", "lora_step")
"""Options of the LoRA whose gradients weight the columns."""


def windows(calibration: Calibration, model: PreTrainedModel) -> list[Batch]:
    """Return the sequences for statistics."""
    if calibration.data is None:
        return []
    return _cut(calibration, calibration.data, calibration.cut.num_samples, model)


def lessons(calibration: Calibration, model: PreTrainedModel, request: Request) -> list[Batch]:
    """Return the sequences for training."""
    source = calibration.data if request.training is None else request.training
    count = max(1, -(-request.recover_tokens // calibration.cut.max_length))
    batches = _cut(calibration, source, count, model)
    for name in (name for batch in batches for name in batch if name not in TEXT):
        raise CalibrationError(
            f"the data has {name!r}, which would be lost: training takes text alone; give "
            "other data: training=, or leave recover= out",
            argument=("training", "recover"),
        )
    return batches


def _cut(calibration: Calibration, source: Any, count: int, model: PreTrainedModel) -> list[Batch]:
    cut = calibration.cut
    return token_batches(
        source,
        calibration.tokenizer,
        num_samples=count,
        max_length=cut.max_length,
        seed=cut.seed,
        bos=cut.bos,
        column=calibration.column if source is calibration.data else None,
        temperature=calibration.temperature if is_self(source) else None,
        cache_dir=calibration.cache_dir,
        model=model,
    )


def drawn(calibration: Calibration, training: Any) -> dict[str, float]:
    """Return the arguments that determine which data is used."""
    cut = calibration.cut
    names = ("num_samples", "max_length", "gradient_samples", "seed")
    found: dict[str, float] = {name: getattr(cut, name) for name in names}
    found |= lora_of(calibration)
    sources = (calibration.data, training)
    if any(begins(source, calibration.tokenizer, cut.bos) for source in sources):
        found["bos"] = True
    if any(map(is_self, sources)):
        found["temperature"] = 1.0 if calibration.temperature is None else calibration.temperature
    return found


def lora_of(calibration: Calibration) -> dict[str, float]:
    """Return the options of the LoRA that were given.

    Example:
        >>> lora_of(Calibration(lora_rank=4))
        {'lora_rank': 4}
    """
    given = {name: getattr(calibration, name) for name in LORA_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def data_for(request: Request, data: Calibration) -> Calibration:
    """Return the data, or the model's own text for a runtime's model without any; warn of that."""
    if request.portable is None or not request.measures or data.data is not None:
        return data
    logger.warning(
        "portable=%r without calibration=: the model writes its own text for the statistics, which "
        "is worse than text like that it will be used on; pass calibration=",
        request.portable,
    )
    return replace(data, data=SELF)


def check_data(request: Request, data: Calibration) -> None:
    """Raise a `TnlmError` unless data is given exactly where it is needed."""
    scheme, metric, training = request.scheme.name, request.measure.name, request.training
    given = data.data is not None or (training is not None and not request.measures)
    if not (given or request.measures or MOVEMENT in request.needs) and request.trains:
        raise CalibrationError(
            f"recover={request.recover!r} trains on data; pass training= or calibration= "
            "(texts, a file, token ids) and tokenizer=",
            argument=("recover", "training", "calibration", "tokenizer"),
        )
    if request.looks_at_data and not given:
        raise CalibrationError(
            f"scheme {scheme!r} with metric={metric!r} needs data; pass calibration= (texts, a "
            "file, token ids) and tokenizer=, or calibration='self' for the model's own text",
            argument=("metric", "calibration", "tokenizer"),
        )
    if not request.looks_at_data and data.data is not None:
        raise OptionError(
            f"calibration= has no effect on scheme {scheme!r} with metric='identity'; "
            "leave it out, or choose a scheme or metric that needs data: svd-llm, metric='input'",
            argument=("calibration", "metric"),
        )
    if request.needs == {MOVEMENT} and data.cache_dir is not None:
        raise OptionError(
            f"cache_dir= keeps calibration statistics, but metric={metric!r} trains and has none",
            argument=("cache_dir", "metric"),
        )
    if data.cache_dir is not None:
        check_cache(data.cache_dir)
    if not request.trains and training is not None:
        raise OptionError(
            "training= has no effect without recover=; leave it out",
            argument=("training", "recover"),
        )
    check_unused(request, data)
    if data.temperature is not None and not any(map(is_self, (data.data, training))):
        raise OptionError(
            "temperature= is for calibration='self', text that the model writes",
            argument=("temperature", "calibration"),
        )
    _check_lora(request, data)
    samples = data.cut.gradient_samples
    if not is_whole(samples) or samples < 1:
        raise OptionError(
            f"gradient_samples={samples!r}; allowed: a whole number >= 1",
            argument="gradient_samples",
        )


def _check_lora(request: Request, data: Calibration) -> None:
    """Raise `OptionError` unless options of a LoRA are in range, and the metric takes one."""
    for name in lora_of(data):
        if LORA not in request.needs:
            raise OptionError(
                f"{name}= has no effect with metric={request.measure.name!r}; allowed with metrics "
                "that take the gradients of a LoRA, such as 'lora-fisher'",
                argument=(name, "metric"),
            )
    if data.lora_rank is not None:
        check_whole("lora_rank", data.lora_rank)
    keeps = KEPT in request.measure.gathering.get(LORA, {})
    if data.lora_steps is not None:
        check_whole("lora_steps", data.lora_steps, int(keeps))
    if data.lora_step is None:
        return
    if not is_real(data.lora_step):
        raise OptionError(
            f"lora_step={data.lora_step!r}; allowed: a finite number", argument="lora_step"
        )
    if not (keeps or data.lora_steps):
        raise OptionError(
            "lora_step= has no effect on a LoRA that is not trained, whose quadratic term is 0; "
            "give lora_steps= as well, or leave it out",
            argument=("lora_step", "lora_steps"),
        )


def check_unused(request: Request, data: Calibration) -> None:
    """Raise `OptionError` if an argument about data is given but no data is used."""
    if request.looks_at_data:
        return
    for each in choices_of("calibration"):
        if getattr(data, each.field) is not None:
            raise OptionError(
                f"{each.keyword}= has no effect on scheme {request.scheme.name!r} with "
                f"metric={request.measure.name!r}, which uses no data; leave it out",
                argument=(each.keyword, "metric"),
            )
