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

from tnlm.calibration.backward_check import agrees, few_blocks
from tnlm.calibration.blocks import Blocks, state_of
from tnlm.calibration.loss import Task
from tnlm.calibration.padding import Padding, padding_of
from tnlm.calibration.passes import run
from tnlm.calibration.pulls import back, leaf_of, pull, top
from tnlm.calibration.states import States
from tnlm.calibration.trail import Trail
from tnlm.calibration.walk import Call, check_walk, eval_mode, first_states, plan_walks
from tnlm.errors import CalibrationError
from tnlm.parallel.workers import ALONE, Workers
from tnlm.targets.ends import output_head
from tnlm.utils.residency import offloaded, resident

logger = logging.getLogger("tnlm")

See = Callable[[str, Tensor, Tensor, Padding | None], None]
"""Called with a watched module's name, input and output, and the padding or None; a hook on the
output receives its gradient."""


def stream(
    model: PreTrainedModel,
    modules: Sequence[str],
    tasks: Sequence[Task],
    see: See,
    trail: Trail | None = None,
    workers: Workers = ALONE,
) -> Generator[float, None, None]:
    """Pass modules' inputs and outputs to ``see``, and propagate gradients back to the outputs.

    With workers, each process does so for its share of the tasks.

    Yields:
        The batches processed since the last yield, as a fraction of whole passes; 0 when the
        modules processed so far are complete.
    """
    with _frozen(model):
        walks, left = plan_walks(model, modules, lambda blocks: _check(model, blocks, tasks))
        passes, mine = len(walks) + bool(left), workers.mine(tasks)
        for blocks, inside, calls in walks:
            way = (trail or Trail(None)).within(blocks[0][0])
            shares = _walk(model, blocks, inside, mine, calls, see, way)
            yield from (share / passes for share in shares)
        if left:
            _check_memory(model, left)
            yield from (f / passes for f in _whole(model, left, mine, see))


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
            back(task.loss(model, run(model, task.batch)))
        yield 1.0
    yield 0.0


def _walk(
    model: PreTrainedModel,
    blocks: Blocks,
    modules: Sequence[str],
    tasks: Sequence[Task],
    calls: list[Call],
    see: See,
    trail: Trail,
) -> Iterator[float]:
    inside = [[m for m in modules if m.startswith(f"{name}.")] for name, _ in blocks]
    lowest = next(number for number, found in enumerate(inside) if found)
    inputs: dict[int, States] = {}
    kept = trail.latest([f"gradient-{n}" for n in reversed(range(lowest, len(blocks) + 1))])
    if kept is None:
        forward = _Forward(model, blocks, calls, tasks, lowest, trail)
        yield from (share / 3 for share in forward.run(inputs))
        gradients, last = forward.gradients(), len(blocks)
        trail.keep(f"gradient-{last}", gradients)
    else:
        gradients, last = trail.states(model, kept), int(kept.removeprefix("gradient-"))
    for number in reversed(range(lowest, last)):
        (name, block), call = blocks[number], calls[number]
        is_here = number in inputs
        states = inputs.pop(number) if is_here else trail.states(model, f"input-{number}")
        with resident(model, name), _watched(model, inside[number], see, None):
            for index, state in enumerate(states):
                gradients[index] = pull(block, call, state, gradients[index])
                yield 2 / 3 / (len(blocks) - lowest)
        yield 0.0  # what was seen is stored before the next line
        trail.keep(f"gradient-{number}", gradients)
        trail.drop(f"gradient-{number + 1}")
        trail.drop(f"input-{number}")


class _Forward:
    """The forward half of the walk, up to the gradients at the last block's output."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Blocks,
        calls: Sequence[Call],
        tasks: Sequence[Task],
        lowest: int,
        trail: Trail,
    ) -> None:
        self._model, self._blocks, self._calls, self._tasks = model, blocks, calls, tasks
        self._lowest, self._trail = lowest, trail
        self._hidden = States(model, [])
        self._like: Any = None

    def run(self, inputs: dict[int, States]) -> Iterator[float]:
        """Put every block's inputs into a dictionary, unless the trail keeps them."""
        places = range(self._lowest, len(self._blocks))
        found = self._trail.latest([f"input-{number}" for number in places])
        start = 0 if found is None else int(found.removeprefix("input-"))
        if found is None:
            batches = [task.batch for task in self._tasks]
            with torch.no_grad():
                self._hidden = first_states(self._model, self._blocks, batches)
        else:
            self._hidden = self._trail.states(self._model, found)
        for number in range(start, len(self._blocks)):
            name, block = self._blocks[number]
            args, named = self._calls[number]
            if number >= self._lowest and not self._trail.keep(f"input-{number}", self._hidden):
                inputs[number] = States(self._model, self._hidden, on_disk=True)
            with resident(self._model, name):
                for index, state in enumerate(self._hidden):
                    with torch.no_grad():
                        self._like = block(state, *args, **named)
                    self._hidden[index] = state_of(self._like)
                    yield 1 / len(self._blocks)

    def gradients(self) -> States:
        """Return the gradient of every task at the last block's output."""
        model, blocks, like = self._model, self._blocks, self._like
        found = (
            top(model, blocks, task, state, like)
            for task, state in zip(self._tasks, self._hidden, strict=True)
        )
        with resident(model, output_head(model)):  # read once, not for every task
            return States(model, found)


def _check(model: PreTrainedModel, blocks: Blocks, tasks: Sequence[Task]) -> list[Call] | None:
    """Return every block's further arguments, or None if walking would give another result."""
    with torch.no_grad():
        calls = check_walk(model, blocks, [task.batch for task in tasks])
    if calls is None:
        return None
    with few_blocks(model, blocks, calls, tasks[0].batch) as tried:
        if agrees(model, tried, tasks[0].batch):
            return calls
    logger.info("blocks are linked by more than the hidden state: using whole backward passes")
    return None


@contextlib.contextmanager
def _watched(
    model: nn.Module, modules: Sequence[str], see: See, padding: Padding | None
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing below is watched: the graph starts here
                output = leaf_of(output)
            see(name, args[0], output, padding)
            return output.clone()  # in-place changes would lose a hook on a view

        return after

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
