"""Propagates gradients back through a model, block by block if the model allows it.

The walk runs every batch forward once, without a graph below the head, and spills the hidden states
between blocks to files. Then it goes from the last block to the first: each is run again on its
stored inputs, now with a graph, and passes the gradient at its input on to the previous block. So
only one block's statistics and graph are in memory. The walk has the conditions of the forward
walk, and blocks may be linked only by the hidden state, which is first checked by the gradient of a
few tokens. Otherwise, whole backward passes are used, whose graph starts at the first watched
module.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.blocks import Blocks, state_of
from tnlm.calibration.bypass import bypassed
from tnlm.calibration.inputs import TEXT
from tnlm.calibration.loss import Task, make_tasks
from tnlm.calibration.padding import Padding, padding_of
from tnlm.calibration.passes import run
from tnlm.calibration.sequences import Batch
from tnlm.calibration.states import States
from tnlm.calibration.walk import (
    Call,
    call_block,
    check_walk,
    eval_mode,
    first_states,
    plan_walks,
    record,
    same,
    take_state,
)
from tnlm.errors import CalibrationError
from tnlm.utils.residency import offloaded, resident

logger = logging.getLogger("tnlm")

See = Callable[[str, Tensor, Tensor, Padding | None], None]
"""Called with a watched module's name, input and output, and the padding or None; a hook on the
output receives its gradient."""

SHORT = 32
"""Number of tokens whose gradient is compared between a walk and a whole pass."""


def stream(
    model: PreTrainedModel, modules: Sequence[str], tasks: Sequence[Task], see: See
) -> Generator[float, None, None]:
    """Pass modules' inputs and outputs to ``see``, and propagate gradients back to the outputs.

    Yields:
        The batches processed since the last yield, as a fraction of whole passes; 0 when the
        modules processed so far are complete.
    """
    with _frozen(model):
        walks, left = plan_walks(model, modules, lambda blocks: _check(model, blocks, tasks))
        passes = len(walks) + bool(left)
        for blocks, inside, calls in walks:
            yield from (f / passes for f in _walk(model, blocks, inside, tasks, calls, see))
        if left:
            _check_memory(model, left)
            yield from (f / passes for f in _whole(model, left, tasks, see))


def _check_memory(model: nn.Module, modules: Sequence[str]) -> None:
    """Raise `CalibrationError` if a whole backward pass would need weights that are on disk."""
    if offloaded(model) is not None:
        raise CalibrationError(
            f"gradients at {modules[0]} and {len(modules) - 1} other modules need a pass through "
            "the whole model, which is on disk; ignore them, or compress the model in memory",
            argument="ignore",
        )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of all parameters, in eval mode, and restore all flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


def _whole(
    model: PreTrainedModel, modules: Sequence[str], tasks: Sequence[Task], see: See
) -> Iterator[float]:
    for task in tasks:
        with _watched(model, modules, see, padding_of(task.batch)):
            _back(task.loss(model, run(model, task.batch)))
        yield 1.0
    yield 0.0


def _walk(
    model: PreTrainedModel,
    blocks: Blocks,
    modules: Sequence[str],
    tasks: Sequence[Task],
    calls: list[Call],
    see: See,
) -> Iterator[float]:
    inside = [[m for m in modules if m.startswith(f"{name}.")] for name, _ in blocks]
    lowest = next(number for number, found in enumerate(inside) if found)
    with torch.no_grad():
        hidden = first_states(model, blocks, [task.batch for task in tasks])
    inputs = [hidden] * len(blocks)
    like: Any = None
    for number, ((name, block), call) in enumerate(zip(blocks, calls, strict=True)):
        if number >= lowest:
            inputs[number] = States(model, hidden, on_disk=True)
        with resident(model, name), torch.no_grad():
            for index, state in enumerate(hidden):
                like = block(state, *call[0], **call[1])
                hidden[index] = state_of(like)
                yield 1 / 3 / len(blocks)
    gradients = States(
        model, (_top(model, blocks, task, hidden[n], like) for n, task in enumerate(tasks))
    )
    for number in reversed(range(lowest, len(blocks))):
        (name, block), call = blocks[number], calls[number]
        with resident(model, name), _watched(model, inside[number], see, None):
            for index, state in enumerate(inputs[number]):
                gradients[index] = _pull(block, call, state, gradients[index])
                yield 2 / 3 / (len(blocks) - lowest)
        yield 0.0


def _check(model: PreTrainedModel, blocks: Blocks, tasks: Sequence[Task]) -> list[Call] | None:
    """Return every block's further arguments, or None if walking would give another result."""
    with torch.no_grad():
        calls = check_walk(model, blocks, [task.batch for task in tasks])
    if calls is None:
        return None
    with _few(model, blocks, calls, tasks[0].batch) as tried:
        agrees = _agrees(model, tried, tasks[0].batch)
    if agrees:
        return calls
    logger.info("the hidden state is not all that links blocks: taking whole backward passes")
    return None


@contextlib.contextmanager
def _few(
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


def _agrees(model: PreTrainedModel, blocks: Blocks, batch: Batch) -> bool:
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
    walked = _top(model, blocks, task, state_of(output), output)
    for (_, block), call, state in reversed(list(zip(blocks, calls, states, strict=True))):
        walked = _pull(block, call, state, walked)
    return same(walked, _bottom(model, blocks, task))


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


def _top(model: PreTrainedModel, blocks: Blocks, task: Task, state: Tensor, like: Any) -> Tensor:
    """Return the gradient at the last block's output, given this, without running the blocks."""
    leaf = _leaf(state)
    with bypassed(model, blocks, like, leaf.clone()):
        _back(task.loss(model, run(model, task.batch)))
    return _gradient(leaf)


def _bottom(model: PreTrainedModel, blocks: Blocks, task: Task) -> Tensor:
    """Return the gradient at the first block's input, through all paths to the loss."""
    leaves: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, (rest, named) = take_state(args, kwargs)
        if state is None:
            return args, kwargs
        leaves.append(_leaf(state))
        return (leaves[0].clone(), *rest), named

    handle = blocks[0][1].register_forward_pre_hook(before, with_kwargs=True)
    try:
        _back(task.loss(model, run(model, task.batch)))
    finally:
        handle.remove()
    return _gradient(leaves[0])


def _pull(block: nn.Module, call: Call, state: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at a block's input, from the one at its output."""
    leaf = _leaf(state)
    _back(call_block(block, leaf.clone(), call), gradient)
    return _gradient(leaf)


def _leaf(tensor: Tensor) -> Tensor:
    """Return the start of a graph; models get a copy, since they may change it in place."""
    return tensor.detach().requires_grad_()


def _back(output: Tensor, gradient: Tensor | None = None) -> None:
    if output.requires_grad:  # otherwise it depends on no watched module
        torch.autograd.backward(output, gradient)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@contextlib.contextmanager
def _watched(
    model: nn.Module, modules: Sequence[str], see: See, padding: Padding | None
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing below is watched: the graph starts here
                output = _leaf(output)
            see(name, args[0], output, padding)
            return output.clone()  # in-place changes would lose a hook on a view

        return after

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
