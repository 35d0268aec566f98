"""What every measurement needs: a model in eval mode, and sequences that it can take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tnlm.errors import EvaluationError
from tnlm.modes import modes_kept

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and restore each module's training flag after.

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


def check_causal(model: PreTrainedModel, what: str) -> None:
    """Raise `EvaluationError` unless a model predicts each token from those before it alone.

    Args:
        model: any transformers model, also within adapters.
        what: what is measured, for the message, e.g. ``"perplexity"``.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    generates = getattr(base, "can_generate", lambda: True)()
    if generates and not base.config.is_encoder_decoder:
        return
    raise EvaluationError(
        f"{what} needs a causal language model; a {type(base).__name__} "
        f"{'reads its text with an encoder' if generates else 'predicts no next token'}"
    )


def check_positions(model: PreTrainedModel, length: int, what: str) -> None:
    """Refuse sequences longer than the model has positions.

    Args:
        model: any transformers model.
        length: tokens of one sequence.
        what: the request, for the message, e.g. ``"window=512"``.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise EvaluationError(f"{what}, but the model has {most} positions; use at most {most}")
