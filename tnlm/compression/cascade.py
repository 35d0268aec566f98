"""The cascade: fit every matrix to the inputs it gets in the compressed model.

Two streams of hidden states run through the blocks: a compressed one, and a dense one, which only
*anchored* needs. Within a block, matrices are fitted in execution order. Before each group that
shares an input, the moments of that input are gathered again, with everything before it already
compressed.

With x the dense input and x~ the compressed one, *sequential* fits W to x~, and *anchored* fits the
output of the dense model: ``min ||W x - W' x~||``. For any format, its optimum is the fit of
``W* = W K C~^-1`` under the metric C~, where C~ = E[x~ x~.T] and K = E[x x~.T]. A fraction of the
anchoring fits the outputs that lie so far between those of sequential and anchored.

Source: anchored, AA-SVD (arXiv 2604.02119) and, the same, QEP; sequential, LLM-ROM (2312.07046).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.blocks import Blocks, find_blocks
from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.states import States
from tnlm.calibration.walk import (
    Call,
    call_block,
    check_walk,
    eval_mode,
    first_states,
)
from tnlm.compression.moments import Moments, Moved, Sums
from tnlm.errors import CalibrationError
from tnlm.targets.base import Member
from tnlm.utils.residency import resident


@dataclass(frozen=True)
class Output:
    """The result of a fit: the ``(out, in)`` product of its factors, and the bias."""

    weight: Tensor
    bias: Tensor | None


Fit = Callable[[Member, Moved | None], Output | None]
"""Fits a target, to the dense statistics if `Moved` is None; returns None to leave it dense."""

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]

Tune = Callable[[str, nn.Module, Call, States, States], bool]
"""Tunes a block, given its name, the dense block, its other arguments, the compressed inputs and
the dense outputs. Returns whether it has run the inputs through the tuned block."""


def cascade(
    model: PreTrainedModel,
    targets: Sequence[Member],
    batches: Sequence[Batch],
    mode: str,
    fit: Fit,
    *,
    anchor: float = 1.0,
    tune: Tune | None = None,
    centered: bool = False,
    wanted: Callable[[Member], bool] = lambda _: True,
    done: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> None:
    """Fit all targets inside blocks, block by block, without changing the model.

    Args:
        model: its blocks must form one stack that can be walked.
        targets: matrices, in the model's order.
        batches: calibration data of one length, without padding.
        mode: ``"sequential"`` or ``"anchored"``.
        fit: called once per target, in execution order.
        anchor: fraction of the anchoring; 0 is the same as ``"sequential"``.
        tune: called when all targets of a block are fitted, before the next block.
        centered: anchor centered inputs, because a bias corrects the means.
        wanted: returns whether a target is fitted; the others stay dense.
        done: called when a block is finished.
        progress: show a progress bar.

    Raises:
        CalibrationError: if the blocks cannot be walked, or the two inputs of a matrix do not pair.
    """
    modules = list(dict.fromkeys(target.module for target in targets))
    tokens = count_tokens(batches)
    with eval_mode(model), torch.no_grad():
        blocks, calls = open_walk(model, modules, batches)
        compressed = first_states(model, blocks, batches)
        anchors = mode == "anchored" and anchor > 0
        dense = States(model, compressed) if anchors or tune is not None else None
        bar = tqdm(blocks, desc="cascade", unit="block", disable=not progress)
        for (name, block), call in zip(bar, calls, strict=True):
            inside = [t for t in filter(wanted, targets) if t.module.startswith(name + ".")]
            with resident(model, name):
                pair = _Pair(name, block, copy.deepcopy(block), call)
                streams = _Streams(compressed, dense if anchors else None, anchor, centered)
                _fit_block(pair, inside, streams, fit, tokens)
                pair.advance(compressed, dense, tune)
                del pair  # frees the clone before the next one is made
            done()


@dataclass(frozen=True)
class _Streams:
    """The inputs of a block, and how matrices are fitted to them; no dense ones if sequential."""

    compressed: States
    dense: States | None
    anchor: float
    centered: bool


def _fit_block(
    pair: _Pair, targets: Sequence[Member], streams: _Streams, fit: Fit, tokens: int
) -> None:
    """Fit the targets of one block, in execution order, and put each fit into its clone."""
    groups = list(pair.groups(targets, streams.compressed[0]))
    for target in targets:
        if not any(target in group for group in groups):
            pair.put(target, fit(target, None))
    for group in groups:
        moments = pair.moments(group[0].module, streams.compressed, streams.dense, tokens)
        for target in group:
            moved = moments.move(pair.weight(target), streams.centered, streams.anchor)
            pair.put(target, fit(target, moved))


def open_walk(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]
) -> tuple[Blocks, list[Call]]:
    """Return the blocks of a model, and the other arguments of each.

    Raises:
        CalibrationError: if the blocks cannot be walked.
    """
    stacks = [name for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    if not any(module.startswith(f"{stack}.") for stack in stacks for module in modules):
        raise CalibrationError(
            f"no target lies in a block of {type(model).__name__} (the first is {modules[0]}), but "
            "a cascade and refinement go from block to block; add targets in blocks, or use "
            "cascade='none' and refine=0",
            argument=("targets", "cascade", "refine"),
        )
    blocks = find_blocks(model, modules)
    calls = check_walk(model, blocks, batches) if blocks else None
    if calls is None:
        raise CalibrationError(
            f"{type(model).__name__} cannot be walked block by block on this data; a cascade and "
            "refinement need one stack of blocks, and sequences of one length without padding; use "
            "cascade='none' and refine=0",
            argument=("cascade", "refine"),
        )
    return blocks, calls


class _Pair:
    """One block and its clone, which is compressed step by step."""

    def __init__(self, name: str, block: nn.Module, clone: nn.Module, call: Call) -> None:
        self._name, self._block, self._clone, self._call = name, block, clone, call

    def _local(self, module: str) -> str:
        return module.removeprefix(self._name + ".")

    def weight(self, target: Member) -> Tensor:
        return target.view(self._block.get_submodule(self._local(target.module)))

    def put(self, target: Member, fitted: Output | None) -> None:
        """Write a fit into the clone."""
        if fitted is None:
            return
        module: Any = self._clone.get_submodule(self._local(target.module))
        target.write(module, module.weight.detach(), fitted.weight)
        if fitted.bias is None:
            return
        if module.bias is None:
            module.bias = nn.Parameter(fitted.bias.clone(), requires_grad=False)
        else:
            module.bias.detach()[target.rows] = fitted.bias.to(module.bias)

    def groups(self, targets: Sequence[Member], state: Tensor) -> Iterator[list[Member]]:
        """Yield the targets that share an input, in execution order.

        Experts are left out: each gets only some tokens, so its two inputs would not pair.
        """
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Hook:
            return lambda _, args: seen.__setitem__(name, args[0])

        with _hooks(self._block, [self._local(t.module) for t in targets], note):
            call_block(self._block, state, self._call)
        order = list(seen)
        whole = {n for n, x in seen.items() if x.shape[:-1].numel() == state.shape[:-1].numel()}
        paired = [target for target in targets if self._local(target.module) in whole]
        paired.sort(key=lambda target: order.index(self._local(target.module)))
        for _, group in groupby(paired, key=lambda target: id(seen[self._local(target.module)])):
            yield list(group)

    def moments(
        self, module: str, compressed: States, dense: States | None, tokens: int
    ) -> Moments:
        """Gather the moments of a module's input, with cross moments if there is a dense stream."""
        local, sums = self._local(module), Sums()
        for index, state in enumerate(compressed):
            seen = [_input_of(self._clone, local, state, self._call)]
            if dense is not None:
                seen.append(_input_of(self._block, local, dense[index], self._call))
            inputs = [x for x in seen if x is not None]
            if len(inputs) < len(seen) or inputs[0].shape != inputs[-1].shape:
                raise CalibrationError(
                    f"{module} gets different tokens in the compressed model and in the dense one, "
                    "so its inputs do not pair; ignore it, or use cascade='none'",
                    argument="cascade",
                )
            sums.add(*inputs)
        return sums.means(tokens)

    def advance(self, compressed: States, dense: States | None, tune: Tune | None = None) -> None:
        """Run the streams through the block, which is tuned to the dense one's outputs first."""
        if dense is not None:
            advance(dense, self._block, self._call)
            about = self._name, self._block, self._call
            if tune is not None and tune(*about, compressed, dense):
                return
        advance(compressed, self._clone, self._call)


def advance(states: States, block: nn.Module, call: Call) -> None:
    """Replace hidden states by those after a block."""
    for index, state in enumerate(states):
        states[index] = call_block(block, state, call)


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a block's run once a module's input is known."""


def _input_of(block: nn.Module, module: str, state: Tensor, call: Call) -> Tensor | None:
    """Return a module's input, or None if it is not called, like an expert without tokens."""
    found: list[Tensor] = []

    def stop(_: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Reached

        return hook

    with _hooks(block, [module], stop), contextlib.suppress(_Reached):
        call_block(block, state, call)
    return found[0] if found else None


@contextlib.contextmanager
def _hooks(block: nn.Module, modules: Sequence[str], make: Callable[[str], Hook]) -> Iterator[None]:
    names = list(dict.fromkeys(modules))
    handles = [block.get_submodule(n).register_forward_pre_hook(make(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
