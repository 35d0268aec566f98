"""Preconditions of measurements: eval mode, a causal model, and sequences that fit it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tnlm.calibration.capacity import positions_of
from tnlm.errors import EvaluationError
from tnlm.utils.training_flags import modes_kept

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and restore every training flag afterwards.

    Example:
        >>> model = torch.nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    with modes_kept(*models), torch.inference_mode():
        for model in models:
            model.eval()
        yield


def room_of(model: PreTrainedModel) -> int | None:
    """Return a model's number of positions, from its config and its table, or None if unknown.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> room_of(GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1)))
        8
    """
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [size for size in (named, positions_of(model)) if isinstance(size, int)]
    return min(known, default=None)


def check_causal(model: PreTrainedModel, what: str) -> None:
    """Raise `EvaluationError` unless a model predicts each token only from those before it.

    Args:
        model: any transformers model, possibly with adapters.
        what: the measurement, for the message, e.g. ``"perplexity"``.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    generates = getattr(base, "can_generate", lambda: True)()
    if generates and not base.config.is_encoder_decoder:
        return
    raise EvaluationError(
        f"{what} needs a causal language model; a {type(base).__name__} "
        f"{'reads its text with an encoder' if generates else 'predicts no next token'}"
    )


def check_positions(
    model: PreTrainedModel, length: int, what: str, argument: str | Sequence[str] = ()
) -> None:
    """Raise `EvaluationError` for sequences longer than the model has positions.

    Args:
        model: any transformers model.
        length: tokens of one sequence.
        what: the request, for the message, e.g. ``"window=512"``.
        argument: the arguments that it names.
    """
    most = room_of(model)
    if most is not None and length > most:
        raise EvaluationError(
            f"{what}, but the model has {most} positions; use at most {most}", argument=argument
        )
