"""The training task of a model, by its kind, and training data for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.text import AUTO
from tnlm.errors import ModelError, OptionError, TrainingError
from tnlm.evaluation.mode import room_of
from tnlm.recovery.examples import (
    Examples,
    batches,
    check_tokens,
    draw,
    is_read_in_part,
    training_set,
)
from tnlm.targets.ends import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def examples_for(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int = 512,
    text: str = "text",
    label: str = "label",
    max_tokens: int | None = None,
    seed: int = 0,
    bos: bool | str = AUTO,
) -> Examples:
    """Convert data into training examples for a model, as ``training_set`` does.

    Raises:
        ModelError: if the kind of the model is unknown.
        TrainingError: if the data does not fit the model.
        OptionError: if sequences are longer than the model has positions.
    """
    kind, classes = model_kind(model), model_kind(model) == "classes"
    check_tokens(max_tokens)
    most = room_of(model)
    if most is not None and max_length > most:
        raise OptionError(
            f"max_length={max_length}, but the model has {most} positions; use at most {most}",
            argument="max_length",
        )
    read = max_tokens if is_read_in_part(data) else None  # short texts are checked completely
    made = training_set(
        data,
        tokenizer,
        max_length=max_length,
        text=text,
        label=label if classes else None,
        masked=kind == "masked",
        max_tokens=read,
        seed=seed,
        bos=bos,
    )
    if classes != made.classes:
        raise TrainingError(
            f"{type(model).__name__} learns classes, but no row of the data has a column "
            f"{label!r}; give rows with text and classes, and name their columns: text=, label=",
            argument="text",
        )
    _check(model, made)
    return Examples(draw(made.items, max_tokens, seed), classes=classes)


def batches_for(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Convert data into batches with labels, unless it already is a list of batches."""
    if isinstance(data, list | tuple) and all(map(_is_batch, data)):
        return list(data)
    padding = padding_for(model, tokenizer, batch_size)
    return batches(examples_for(model, data, tokenizer, **options), batch_size, padding)


def _is_batch(item: Any) -> bool:
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    return isinstance(ids, Tensor) and ids.dim() == 2


def _check(model: PreTrainedModel, examples: Examples) -> None:
    """Raise `TrainingError` for token ids or classes that the model does not have."""
    words, choices = vocabulary_of(model), model.config.num_labels or 0
    for index, item in enumerate(examples.items):
        token = int(item["input_ids"].max())
        if words is not None and token >= words:
            raise TrainingError(
                f"example {index} has the token id {token}, but the model has {words} tokens; "
                "use the model's own tokenizer"
            )
        if examples.classes and int(item["labels"]) >= choices:
            raise TrainingError(
                f"example {index} has the class {int(item['labels'])}, but the model has "
                f"{choices}, counted from 0; load it with num_labels="
            )


def model_kind(model: PreTrainedModel) -> str:
    """Return what a model learns: ``"causal"`` or ``"masked"`` text, or ``"classes"``.

    Raises:
        ModelError: if it is none of these.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()  # without adapters
    name = type(base).__name__
    if name.endswith("ForSequenceClassification"):
        return "classes"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if base.config.is_encoder_decoder or not base.can_generate():
        raise ModelError(
            f"a {name} cannot be trained here; load it as a causal or masked language model, or "
            "as a sequence classifier"
        )
    return "causal"


def padding_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
) -> int:
    """Return the padding token id: the model's, or else the tokenizer's.

    Raises:
        OptionError: if a classifier has none and batches need padding.
    """
    own = getattr(model.config, "pad_token_id", None)
    if own is None and batch_size > 1 and model_kind(model) == "classes":
        raise OptionError(
            f"{type(model).__name__} has no padding token, and could not find the last token of a "
            "padded sequence; set model.config.pad_token_id, or use batch_size=1",
            argument="batch_size",
        )
    known = (own, getattr(tokenizer, "pad_token_id", None))
    return next((token for token in known if token is not None and token >= 0), 0)
