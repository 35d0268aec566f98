"""Runs calibration data through a model, block by block if the model allows it.

A walk keeps the hidden states of all batches and finishes one block after another, so that only one
block's statistics are in memory. Each stack of blocks is walked separately, such as an image tower,
an encoder or a text decoder. The batches must have the same shape and no padding, and blocks may
depend on the batch only through the hidden state; this is first checked on two batches against the
whole model. Otherwise, whole forward passes are run with hooks on every module.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from tnlm.calibration.agreement import equal, same
from tnlm.calibration.blocks import Blocks, find_stacks, split, state_of
from tnlm.calibration.caching import caches_kept
from tnlm.calibration.inputs import TEXT, main_input
from tnlm.calibration.padding import Padding, padding_of
from tnlm.calibration.passes import run
from tnlm.calibration.sequences import Batch
from tnlm.calibration.states import States
from tnlm.calibration.trail import Trail
from tnlm.parallel.workers import ALONE, Workers
from tnlm.targets.ends import input_table
from tnlm.utils.residency import resident
from tnlm.utils.training_flags import modes_kept

logger = logging.getLogger("tnlm")

See = Callable[[str, Tensor, Padding | None], None]
"""Called with a watched module's name and input, and the padding or None."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block besides the hidden state."""

Walk = tuple[Blocks, list[str], list[Call]]
"""A stack, the watched modules in it, and every block's further arguments."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the first block's input is known."""


def stream(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    see: See,
    trail: Trail | None = None,
    workers: Workers = ALONE,
) -> Generator[float, None, None]:
    """Pass the inputs of modules to ``see``, batch by batch; with workers, of a share of them.

    Yields:
        The batches processed since the last yield, as a fraction of whole passes; 0 when the
        modules processed so far are complete.
    """
    with eval_mode(model), torch.inference_mode():
        walks, left = plan_walks(model, modules, lambda blocks: check_walk(model, blocks, batches))
        passes, mine = len(walks) + bool(left), workers.mine(batches)
        for blocks, inside, calls in walks:
            way = (trail or Trail(None)).within(blocks[0][0])
            shares = _walk(model, blocks, inside, mine, calls, see, way)
            yield from (share / passes for share in shares)
        if left:
            yield from (f / passes for f in _whole(model, left, mine, see))


def plan_walks(
    model: nn.Module, modules: Sequence[str], check: Callable[[Blocks], list[Call] | None]
) -> tuple[list[Walk], list[str]]:
    """Return the stacks that can be walked, and the modules that need whole passes.

    Args:
        model: the model with the modules.
        modules: dotted names of the watched modules.
        check: returns every block's further arguments, or None if a stack cannot be walked.
    """
    walks, left = [], list(modules)
    for blocks in find_stacks(model, modules):
        inside, _ = split(modules, blocks)
        calls = check(blocks)
        if calls is not None:
            walks.append((blocks, inside, calls))
            left = [name for name in left if name not in inside]
    return walks, left


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without a cache, and restore both in every module afterwards."""
    with modes_kept(model), caches_kept(model, use=False):
        model.eval()
        yield


def _whole(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch], see: See
) -> Iterator[float]:
    for batch in batches:
        with _watched(model, modules, see, padding_of(batch)):
            run(model, batch, _body(model, modules))
        yield 1.0
    yield 0.0


def _walk(
    model: PreTrainedModel,
    blocks: Blocks,
    modules: Sequence[str],
    batches: Sequence[Batch],
    calls: list[Call],
    see: See,
    trail: Trail,
) -> Iterator[float]:
    start, hidden = _resume(model, blocks, batches, trail)
    for number in range(start, len(blocks)):
        (name, block), call = blocks[number], calls[number]
        inside = [module for module in modules if module.startswith(name + ".")]
        with resident(model, name), _watched(model, inside, see, None):
            for index, state in enumerate(hidden):
                hidden[index] = call_block(block, state, call)
                yield 1.0 / len(blocks)
        yield 0.0  # what was seen is stored before the next line
        trail.keep(str(number + 1), hidden)
        trail.drop(str(number))


def _resume(
    model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch], trail: Trail
) -> tuple[int, States]:
    """Return the block at which a walk starts, and the states there."""
    found = trail.latest([str(number) for number in range(len(blocks) + 1)])
    if found is None:
        return 0, first_states(model, blocks, batches)
    return int(found), trail.states(model, found)


def check_walk(
    model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch]
) -> list[Call] | None:
    """Return every block's further arguments, or None if walking would give other states."""
    shapes = {tuple(sorted((name, t.shape) for name, t in batch.items())) for batch in batches}
    if len(shapes) > 1 or any(padding_of(batch) is not None for batch in batches):
        return None
    # Two batches, interleaved as in a walk, since blocks may store values for later blocks.
    calls, first, after_first = record(model, blocks, batches[0])
    _, last, after_last = record(model, blocks, batches[-1])
    if calls is None or first is None or last is None or len(calls) != len(blocks):
        return None
    states = _replayed(model, blocks, calls, [first, last])
    walked = all(map(same, states, (after_first, after_last))) if states else False
    if walked and _calls_agree(model, blocks, batches, calls[0]):
        return calls
    logger.info("blocks depend on more than the hidden state: calibrating with whole passes")
    return None


def _replayed(
    model: nn.Module, blocks: Blocks, calls: Sequence[Call], states: list[Tensor]
) -> list[Tensor] | None:
    """Return states after all blocks in turn, or None if a block does not accept them."""
    for (name, block), call in zip(blocks, calls, strict=True):
        try:
            with resident(model, name):
                states = [call_block(block, state, call) for state in states]
        except Exception:  # the model's code may raise anything
            return None
        if not all(isinstance(state, Tensor) for state in states):
            return None
    return states


def _calls_agree(
    model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch], call: Call
) -> bool:
    """Return whether all batches give the first block the same arguments besides the state.

    For batches of only token ids they do, since these arguments are masks and positions.
    """
    if set(batches[0]) <= set(TEXT) and not model.config.is_encoder_decoder:
        return True
    body = _body(model, [blocks[0][0]])
    found = (_block_input(model, body, blocks, batch) for batch in batches)
    return all(each is not None and equal(each[1], call) for each in found)


def record(
    model: PreTrainedModel, blocks: Blocks, batch: Batch
) -> tuple[list[Call] | None, Tensor | None, Tensor | None]:
    """Run one batch; return all blocks' further arguments, the first input and last output."""
    calls: list[Call] = []
    first: Tensor | None = None
    last: list[Any] = []
    known = True

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal first, known
        state, call = take_state(args, kwargs)
        cached = any(isinstance(each, Cache) for each in (*call[0], *call[1].values()))
        known = known and state is not None and not cached  # a cache would grow with every call
        first = state if not calls else first  # only the first, since together they are large
        calls.append(call)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last.append(state_of(output))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for _, block in blocks]
    handles.append(blocks[-1][1].register_forward_hook(after))
    try:
        run(model, batch, _body(model, [blocks[0][0]]))
    finally:
        for handle in handles:
            handle.remove()
    return (calls, first, last[-1]) if known and calls and last else (None, None, None)


def first_states(model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch]) -> States:
    """Return the first block's hidden state for every batch."""
    body = _body(model, [blocks[0][0]])
    found = (_block_input(model, body, blocks, batch) for batch in batches)
    with resident(model, input_table(model)):  # read once, not for every batch
        return States(model, (each[0] for each in found if each is not None))


def _block_input(
    model: PreTrainedModel, body: nn.Module, blocks: Blocks, batch: Batch
) -> tuple[Tensor, Call] | None:
    """Return the first block's hidden state and other arguments for a batch."""
    found: list[tuple[Tensor, Call]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, call = take_state(args, kwargs)
        if state is not None:
            found.append((state, call))
        raise _Stop

    handle = blocks[0][1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_Stop):
            run(model, batch, body)
    finally:
        handle.remove()
    return found[0] if found else None


def take_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    """Split a block's arguments into the hidden state and the rest."""
    if args and isinstance(args[0], Tensor):
        return args[0], (args[1:], kwargs)
    state = kwargs.get("hidden_states")
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return state if isinstance(state, Tensor) else None, (args, rest)


def call_block(block: nn.Module, state: Tensor, call: Call) -> Tensor:
    """Run a block on a hidden state and return the next one."""
    result: Tensor = state_of(block(state, *call[0], **call[1]))
    return result


def _body(model: PreTrainedModel, modules: Sequence[str]) -> nn.Module:
    """Return the model without its output head, unless a watched module is in the head."""
    inner, body = f"{model.base_model_prefix}.", model.base_model
    reads = main_input(model) in inspect.signature(body.forward).parameters
    return body if reads and all(name.startswith(inner) for name in modules) else model


@contextlib.contextmanager
def _watched(
    model: nn.Module, modules: Sequence[str], see: See, padding: Padding | None
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0], padding)

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
