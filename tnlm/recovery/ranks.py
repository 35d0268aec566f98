"""How many directions a matrix really uses: a diagnostic of pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import OptionError
from tnlm.targets import ALL_LINEAR, Selector, select


def effective_rank(matrix: Tensor) -> float:
    """Return exp(entropy) of the singular values, taken as shares of their sum.

    It is r for r equal singular values, and 0 for a matrix of zeros. Computed in float64.

    Args:
        matrix: ``(m, n)``.

    Raises:
        OptionError: if it is no matrix, or not finite.

    Source: Roy and Vetterli 2007, "The effective rank".

    Example:
        >>> round(effective_rank(torch.eye(5)[:, :3]), 6)
        3.0
    """
    if matrix.dim() != 2 or not bool(matrix.isfinite().all()):
        raise OptionError(f"a finite matrix is wanted, not {tuple(matrix.shape)}")
    values = torch.linalg.svdvals(matrix.detach().double())
    total = float(values.sum())
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


def effective_ranks(model: PreTrainedModel, modules: Selector = ALL_LINEAR) -> dict[str, float]:
    """Return the effective rank of every matrix of an ordinary model, by its target's name.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
        >>> list(effective_ranks(model, ["c_fc"]))
        ['transformer.h.0.mlp.c_fc']
    """
    found: nn.Module = model
    return {t.name: effective_rank(t.weight(found)) for t in select(model, modules).targets}
