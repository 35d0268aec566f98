"""Tries on a few tokens whether gradients may be taken back block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.agreement import same
from tnlm.calibration.blocks import Blocks, state_of
from tnlm.calibration.bypass import bypassed
from tnlm.calibration.inputs import TEXT
from tnlm.calibration.loss import make_tasks
from tnlm.calibration.passes import run
from tnlm.calibration.pulls import bottom, pull, top
from tnlm.calibration.sequences import Batch
from tnlm.calibration.walk import Call, first_states, record, take_state
from tnlm.utils.residency import offloaded, resident

SHORT = 32
"""Number of tokens whose gradient is compared between a walk and a whole pass."""


@contextlib.contextmanager
def few_blocks(
    model: PreTrainedModel, blocks: Blocks, calls: Sequence[Call], batch: Batch
) -> Iterator[Blocks]:
    """Yield all blocks; if weights are on disk, the first two and the last, without the others.

    The graph of a whole pass holds the weights of all blocks that it goes through.
    """
    few = list(dict([*blocks[:2], blocks[-1]]).items())
    if offloaded(model) is None:
        yield blocks
        return
    others = [each for each in blocks if each not in few]
    with resident(model, *(name for name, _ in few)), torch.no_grad():
        [state] = first_states(model, blocks, [batch])
        like = blocks[0][1](state, *calls[0][0], **calls[0][1])
        with bypassed(model, others, like), torch.enable_grad():
            yield few


def agrees(model: PreTrainedModel, blocks: Blocks, batch: Batch) -> bool:
    """Return whether the gradient of a few tokens at the first block is the same walked and whole.

    The blocks' weights are in memory.
    """
    few = _shortened(batch)
    [task] = make_tasks(model, [few])
    with torch.no_grad():
        calls = record(model, blocks, few)[0]
        states, output = _through(model, blocks, few)
    if calls is None or len(states) != len(blocks):  # the head does not call them all
        return False
    try:
        walked = top(model, blocks, task, state_of(output), output)
    except Exception:  # code of others: whatever it raises, it reads more than the last state
        return False
    for (_, block), call, state in reversed(list(zip(blocks, calls, states, strict=True))):
        walked = pull(block, call, state, walked)
    return same(walked, bottom(model, blocks, task))


def _shortened(batch: Batch) -> Batch:
    """Return one sequence's first tokens, unless there are images or audio beside them."""
    if not set(batch) <= set(TEXT):
        return batch
    labels = {key: batch[key][:1] for key in ("labels",) if key in batch}
    return {key: value[:1, :SHORT] for key, value in batch.items() if key not in labels} | labels


def _through(model: PreTrainedModel, blocks: Blocks, batch: Batch) -> tuple[list[Tensor], Any]:
    """Return the hidden state at every block's input, and the last one's output."""
    states: list[Tensor] = []
    output: Any = None

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = take_state(args, kwargs)[0]
        if state is not None:
            states.append(state.detach().clone())  # a block may work in place

    def after(_: nn.Module, __: Any, found: Any) -> None:
        nonlocal output
        output = found

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for _, block in blocks]
    handles.append(blocks[-1][1].register_forward_hook(after))
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return states, output
