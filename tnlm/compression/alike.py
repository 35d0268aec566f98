"""Whether all processes that share work were given the same."""

from __future__ import annotations

from transformers import PreTrainedModel

from tnlm.parallel.workers import Workers
from tnlm.plans.report import versions
from tnlm.utils.hashing import model_hash


def check_alike(model: PreTrainedModel, workers: Workers) -> None:
    """Raise `ProcessError` unless all processes have the same versions and the same model.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from tnlm.parallel.workers import ALONE
        >>> check_alike(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)), ALONE)
    """
    if workers.size > 1:
        workers.check_same(**versions())
        workers.check_same(model=model_hash(model))
