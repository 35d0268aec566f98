"""Runs calibration data through a model, block by block where the model allows it.

Walking keeps the hidden states of all batches and finishes one block after another, so that only
one block's statistics are in memory. It needs a single stack of blocks and batches of one shape
without padding; two batches are checked against the whole model first. Anything else takes the
plain way, whole forward passes with hooks on every module.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.caching import caches_kept
from tnlm.calibration.data import Batch
from tnlm.utils.training_flags import modes_kept

logger = logging.getLogger("tnlm")

See = Callable[[str, Tensor, Tensor | None], None]
"""Called with a watched module's name, its input, and the padding mask if there is padding."""

Blocks = list[tuple[str, nn.Module]]
"""The blocks of a stack, in order, with their names."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides the hidden state."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass once the first block's input is known."""


def stream(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch], see: See
) -> Generator[float, None, None]:
    """Show the inputs of modules to ``see``, batch by batch.

    Yields:
        The batches done since the last yield, as a fraction of whole passes; 0 when the modules
        seen so far are complete.
    """
    with eval_mode(model), torch.inference_mode():
        blocks = find_blocks(model, modules)
        inside, outside = split(modules, blocks)
        calls = check_walk(model, blocks, batches) if inside else None
        if calls is None:
            yield from _whole(model, modules, batches, see)
            return
        passes = 1 + bool(outside)
        yield from (f / passes for f in _walk(model, blocks, inside, batches, calls, see))
        if outside:
            yield from (f / passes for f in _whole(model, outside, batches, see))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without a cache, and restore both in each module after."""
    with modes_kept(model), caches_kept(model, use=False):
        model.eval()
        yield


def padding_of(batch: Batch) -> Tensor | None:
    """Return the mask of a batch, or None if all its tokens count."""
    mask = batch["attention_mask"]
    return None if bool(mask.all()) else mask


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
) -> Iterator[float]:
    hidden = first_states(model, blocks, batches)
    for (name, block), call in zip(blocks, calls, strict=True):
        inside = [module for module in modules if module.startswith(name + ".")]
        with _watched(model, inside, see, None):
            for index, state in enumerate(hidden):
                hidden[index] = call_block(block, state, call)
                yield 1.0 / len(blocks)
        yield 0.0


def find_blocks(model: nn.Module, modules: Sequence[str]) -> Blocks:
    """Return the blocks of the one list that holds watched modules, or nothing if not just one."""
    stacks = {
        name: stack
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and any(m.startswith(name + ".") for m in modules)
    }
    outer = [n for n in stacks if not any(n.startswith(other + ".") for other in stacks)]
    if len(outer) != 1:
        return []
    blocks = [(f"{outer[0]}.{index}", block) for index, block in enumerate(stacks[outer[0]])]
    watched = {model.get_submodule(name) for name in modules}
    held = [module for _, block in blocks for module in set(block.modules()) & watched]
    return blocks if len(held) == len(set(held)) else []  # none is shared between blocks


def split(modules: Sequence[str], blocks: Blocks) -> tuple[list[str], list[str]]:
    """Return the modules inside blocks, and the others."""
    inside = [n for n in modules if any(n.startswith(name + ".") for name, _ in blocks)]
    return inside, [n for n in modules if n not in inside]


def check_walk(
    model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch]
) -> list[Call] | None:
    """Return every block's further arguments, or None if walking would not give the same states."""
    shapes = {tuple(batch["input_ids"].shape) for batch in batches}
    if len(shapes) > 1 or not all(bool(batch["attention_mask"].all()) for batch in batches):
        return None
    # Two batches, interleaved as in walking: blocks may leave things aside for later blocks.
    calls, first, after_first = record(model, blocks, batches[0])
    _, last, after_last = record(model, blocks, batches[-1])
    if calls is None or first is None or last is None or len(calls) != len(blocks):
        return None
    states = [first, last]
    for (_, block), call in zip(blocks, calls, strict=True):
        states = [call_block(block, state, call) for state in states]
    if same(states[0], after_first) and same(states[1], after_last):
        return calls
    logger.info("blocks depend on more than the hidden state: calibrating with whole passes")
    return None


def same(state: Tensor, expected: Tensor | None) -> bool:
    """Whether two computations of a tensor agree, up to rounding."""
    if expected is None or state.shape != expected.shape:
        return False
    expected = expected.float()
    return bool((state.float() - expected).norm() <= 1e-3 * expected.norm())


def record(
    model: PreTrainedModel, blocks: Blocks, batch: Batch
) -> tuple[list[Call] | None, Tensor | None, Tensor | None]:
    """Run one batch; return each block's further arguments, the first input and the last output."""
    calls: list[Call] = []
    first: Tensor | None = None
    last: list[Any] = []
    known = True

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal first, known
        state, call = take_state(args, kwargs)
        known = known and state is not None
        first = state if not calls else first  # one of them: together they are large
        calls.append(call)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for _, block in blocks]
    handles.append(blocks[-1][1].register_forward_hook(after))
    try:
        run(model, batch, _body(model, [blocks[0][0]]))
    finally:
        for handle in handles:
            handle.remove()
    return (calls, first, last[-1]) if known and calls and last else (None, None, None)


def first_states(model: PreTrainedModel, blocks: Blocks, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the hidden state that every batch brings to the first block."""
    body = _body(model, [blocks[0][0]])
    return [_block_input(model, body, blocks, batch) for batch in batches]


def _block_input(model: PreTrainedModel, body: nn.Module, blocks: Blocks, batch: Batch) -> Tensor:
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = take_state(args, kwargs)[0]
        if state is not None:
            found.append(state)
        raise _Stop

    handle = blocks[0][1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_Stop):
            run(model, batch, body)
    finally:
        handle.remove()
    return found[0]


def take_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    """Split a block's arguments into the hidden state and the rest."""
    if args and isinstance(args[0], Tensor):
        return args[0], (args[1:], kwargs)
    state = kwargs.get("hidden_states")
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return state if isinstance(state, Tensor) else None, (args, rest)


def call_block(block: nn.Module, state: Tensor, call: Call) -> Tensor:
    """Run a block on a hidden state and return the next one."""
    output = block(state, *call[0], **call[1])
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


def _body(model: PreTrainedModel, modules: Sequence[str]) -> nn.Module:
    """Return the model without its output head, unless a module is in the head."""
    inner = f"{model.base_model_prefix}."
    return model.base_model if all(name.startswith(inner) for name in modules) else model


def run(model: PreTrainedModel, batch: Mapping[str, Tensor], body: nn.Module | None = None) -> Any:
    """Run a batch through a model, or a body within it, and return the output."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    caching = getattr(model.config, "use_cache", None) is not None
    options = {"use_cache": False} if caching else {}
    return (model if body is None else body)(**inputs, **options)


@contextlib.contextmanager
def _watched(
    model: nn.Module, modules: Sequence[str], see: See, mask: Tensor | None
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0], mask)

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
