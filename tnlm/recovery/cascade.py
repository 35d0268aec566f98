"""The cascade: every matrix is fitted to the inputs that it will really get.

Two streams of hidden states run through the blocks, one dense, one compressed. Inside a block the
matrices are fitted in the order in which they run; before each group that shares an input, the
moments of that input are gathered again, with everything before it compressed already.

With x the dense input and x~ the compressed one, *sequential* fits W to x~, and *anchored* fits the
output that the dense model had: ``min ||W x - W' x~||``. Its optimum under any format is the fit of
``W* = W K C~^-1`` under the metric C~, where C~ = E[x~ x~.T] and K = E[x x~.T].

Source: anchored, AA-SVD (arXiv 2604.02119) and, the same, QEP; sequential, LLM-ROM (2312.07046).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.statistics import ROWS
from tnlm.calibration.walk import (
    Blocks,
    Call,
    call_block,
    check_walk,
    eval_mode,
    find_blocks,
    first_states,
)
from tnlm.errors import CalibrationError
from tnlm.targets import Target

ANCHOR_DAMPING = 1e-2
"""Share of mean(diag(C~)) added to C~ and K: where the data says little, W* stays W."""


@dataclass(frozen=True)
class Moved:
    """What a matrix is to be fitted to.

    Attributes:
        weight: ``(out, in)`` matrix to approximate: the dense one, or the anchored W*.
        statistics: ``moment``, ``mean`` and ``magnitude`` of the compressed input.
        output: mean output ``(out,)`` of the dense matrix, without its bias.
    """

    weight: Tensor
    statistics: Mapping[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class Fitted:
    """What a fit gave: the dense ``(out, in)`` weight that its factors stand for, and the bias."""

    weight: Tensor
    bias: Tensor | None


Fit = Callable[[Target, Moved | None], Fitted | None]
"""Fits a target, to its dense statistics if it is not moved; None leaves it as it is."""

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def cascade(
    model: PreTrainedModel,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    mode: str,
    fit: Fit,
    *,
    centered: bool = False,
    progress: bool = True,
) -> None:
    """Fit all targets that stand in blocks, block by block; the model itself is not changed.

    Args:
        model: its blocks must form one stack that can be walked.
        targets: matrices, in the model's order.
        batches: calibration data of one length, without padding.
        mode: ``"sequential"`` or ``"anchored"``.
        fit: called once a target, in the order in which they run.
        centered: anchor about the means, which a bias takes care of.
        progress: show a progress bar.

    Raises:
        CalibrationError: if the blocks cannot be walked, or a block's two inputs do not pair.
    """
    modules = list(dict.fromkeys(target.module for target in targets))
    tokens = count_tokens(batches)
    with eval_mode(model), torch.no_grad():
        blocks, calls = open_walk(model, modules, batches)
        dense = first_states(model, blocks, batches)
        compressed = list(dense)
        bar = tqdm(blocks, desc="cascade", unit="block", disable=not progress)
        for (name, block), call in zip(bar, calls, strict=True):
            pair = _Pair(name, block, copy.deepcopy(block), call)
            inside = [target for target in targets if target.module.startswith(name + ".")]
            groups = list(pair.groups(inside, dense[0]))
            for target in inside:
                if not any(target in group for group in groups):
                    pair.put(target, fit(target, None))
            for group in groups:
                moments = pair.moments(group[0].module, dense, compressed, tokens)
                for target in group:
                    pair.put(target, fit(target, moments.move(pair.weight(target), mode, centered)))
            pair.advance(dense, compressed)


def open_walk(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]
) -> tuple[Blocks, list[Call]]:
    """Return the blocks of a model, and each one's further arguments.

    Raises:
        CalibrationError: if the blocks cannot be walked.
    """
    blocks = find_blocks(model, modules)
    calls = check_walk(model, blocks, batches) if blocks else None
    if calls is None:
        raise CalibrationError(
            f"{type(model).__name__} cannot be walked block by block on this data, which a cascade "
            "needs: one stack of blocks, and sequences of one length without padding; use "
            "cascade='none'"
        )
    return blocks, calls


@dataclass(frozen=True)
class _Moments:
    """Sums over tokens of one pair of inputs, dense x and compressed x~."""

    moment: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    magnitude: Tensor

    def move(self, weight: Tensor, mode: str, centered: bool) -> Moved:
        """Return what a matrix with this input is to be fitted to."""
        full = weight.detach().double()
        statistics = {"moment": self.moment, "mean": self.mean, "magnitude": self.magnitude}
        if mode == "sequential":
            return Moved(full, statistics, full @ self.mean)
        moment, cross = self.moment, self.cross
        if centered:
            moment = moment - torch.outer(self.mean, self.mean)
            cross = cross - torch.outer(self.dense_mean, self.mean)
        return Moved(anchored(full, moment, cross), statistics, full @ self.dense_mean)


def anchored(weight: Tensor, moment: Tensor, cross: Tensor, damping: float | None = None) -> Tensor:
    """Return W* = W K C~^-1, the matrix whose output on x~ is nearest to that of W on x.

    Args:
        weight: W, ``(out, in)``, float64.
        moment: C~ = E[x~ x~.T], ``(in, in)``.
        cross: K = E[x x~.T], ``(in, in)``.
        damping: share of the mean diagonal of C~ that is added to both.

    Example:
        >>> weight, moment = torch.ones(1, 2).double(), torch.eye(2).double()
        >>> anchored(weight, moment, 2 * moment, damping=1e-9).round(decimals=6)
        tensor([[2., 2.]], dtype=torch.float64)
    """
    share = ANCHOR_DAMPING if damping is None else damping
    ridge = share * float(moment.diagonal().mean())
    if ridge <= 0:  # the compressed input is silent: nothing to correct
        return weight
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    change: Tensor = torch.linalg.solve(damped, (cross - moment).T).T
    return weight + weight @ change


class _Pair:
    """One block and its clone, which is compressed step by step."""

    def __init__(self, name: str, block: nn.Module, clone: nn.Module, call: Call) -> None:
        self._name, self._block, self._clone, self._call = name, block, clone, call

    def _local(self, module: str) -> str:
        return module.removeprefix(self._name + ".")

    def weight(self, target: Target) -> Tensor:
        return target.view(self._block.get_submodule(self._local(target.module)))

    def put(self, target: Target, fitted: Fitted | None) -> None:
        """Write a fit into the clone."""
        if fitted is None:
            return
        module: Any = self._clone.get_submodule(self._local(target.module))
        target.view(module).copy_(fitted.weight)
        if fitted.bias is None:
            return
        if module.bias is None:
            module.bias = nn.Parameter(fitted.bias.clone(), requires_grad=False)
        else:
            rows = target.shape[0]
            module.bias[target.part * rows : (target.part + 1) * rows].copy_(fitted.bias)

    def groups(self, targets: Sequence[Target], state: Tensor) -> Iterator[list[Target]]:
        """Yield the targets that share an input, in the order in which they run.

        Experts, which see some tokens only, would not pair and are left out.
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
        self, module: str, dense: Sequence[Tensor], compressed: Sequence[Tensor], tokens: int
    ) -> _Moments:
        """Gather the moments of a module's input in both streams."""
        local, sums = self._local(module), _Sums()
        for one, other in zip(dense, compressed, strict=True):
            x = _input_of(self._block, local, one, self._call)
            y = _input_of(self._clone, local, other, self._call)
            if x is None or y is None or x.shape != y.shape:
                raise CalibrationError(
                    f"{module} sees other tokens in the compressed model than in the dense one, "
                    "so that its inputs do not pair; ignore it, or use cascade='none'"
                )
            sums.add(x, y)
        return sums.means(tokens)

    def advance(self, dense: list[Tensor], compressed: list[Tensor]) -> None:
        """Run both streams through the block."""
        for states, module in ((dense, self._block), (compressed, self._clone)):
            for index, state in enumerate(states):
                states[index] = call_block(module, state, self._call)


class _Sums:
    """Products in the model's precision, sums in float64."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        x, y = dense.reshape(-1, dense.shape[-1]), compressed.reshape(-1, dense.shape[-1])
        for a, b in zip(x.float().split(ROWS), y.float().split(ROWS), strict=True):
            parts = [b.T @ b, a.T @ b, b.sum(0), a.sum(0), b.abs().sum(0)]
            if not self._sums:
                self._sums = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
            for total, part in zip(self._sums, parts, strict=True):
                total += part

    def means(self, tokens: int) -> _Moments:
        return _Moments(*(total.cpu() / tokens for total in self._sums))


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a block's run once a module's input is known."""


def _input_of(block: nn.Module, module: str, state: Tensor, call: Call) -> Tensor | None:
    """Return a module's input; None if it is not reached, as an expert that gets no token."""
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
