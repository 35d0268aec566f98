"""Checks, on a few tokens, that the heads of every block act independently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.passes import run
from tnlm.calibration.walk import eval_mode
from tnlm.errors import ModelError
from tnlm.recovery.pruning.groups import Groups
from tnlm.targets.stubs import Call
from tnlm.targets.trial import objection

TOKENS = 8
"""Number of tokens to run through the model."""


def check_heads(
    model: PreTrainedModel,
    blocks: Sequence[Groups],
    keep: int,
    template: nn.Module,
    batch: Mapping[str, Tensor],
) -> None:
    """Raise `ModelError` unless each block's heads do the same when others are removed.

    Args:
        model: run once on a few tokens, in eval mode; left unchanged.
        blocks: the heads of every block.
        keep: how many of them to keep.
        template: a model with this many, whose parameters are not read.
        batch: ``input_ids`` and ``attention_mask``.
    """
    calls = _calls(model, blocks, batch)
    for block in blocks:
        if block.parent not in calls:
            raise ModelError(f"{block.parent} is never called on the data; use heads=False")
        against = objection(
            model.get_submodule(block.parent),
            block.hidden,
            keep=keep,
            call=calls[block.parent],
            sizes=template.get_submodule(block.parent),
        )
        if against is not None:
            raise ModelError(f"{block.parent}: heads cannot be cut: {against}; use heads=False")


def _calls(
    model: PreTrainedModel, blocks: Sequence[Groups], batch: Mapping[str, Tensor]
) -> dict[str, Call]:
    """Return the arguments with which the parent of every block's heads is called."""
    calls: dict[str, Call] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (args, kwargs))

        return keep

    names = ("input_ids", "attention_mask")
    few = {name: batch[name][:1, :TOKENS] for name in names if name in batch}
    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for block in blocks:
            parent = model.get_submodule(block.parent)
            hook = parent.register_forward_pre_hook(keeper(block.parent), with_kwargs=True)
            stack.callback(hook.remove)
        run(model, few)
    return calls
