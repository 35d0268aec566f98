"""What every measurement needs: a model in eval mode, and sequences that it can take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
