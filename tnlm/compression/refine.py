"""Block refinement: train a block's factors to reproduce the output of the dense block.

The compressed stream runs through a block's fitted layers, the dense stream through the dense
block, and AdamW brings the outputs together by training the factors, biases and norms. This works
for any format: it trains whatever parameters the fitted layers have. In a cascade, a block is
refined before the next one is fitted to its outputs; otherwise, blocks are refined after all fits.

Source: AA-SVD's block-level refinement (arXiv 2604.02119), with its optimizer and schedule.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.states import States
from tnlm.calibration.walk import Call, call_block, eval_mode, first_states
from tnlm.compression.cascade import advance, open_walk
from tnlm.compression.tuning import LEARNING_RATE, BlockTask, Gain, split_windows, tune

logger = logging.getLogger("tnlm")

Take = Callable[[str], Mapping[str, nn.Module]]
"""Returns the fitted modules of a block, by dotted name; they are trained in place, except
parameters that require no gradient."""
Keep = Callable[[str, Mapping[str, nn.Module]], None]
"""Receives the tuned modules of a block, by dotted name: the fitted ones, and norms."""


class Refinement:
    """Tunes one block after another, without changing the model.

    Args:
        tokens: how many tokens to tune each block on; data that is too short is repeated.
        take: returns the fitted modules of a block.
        keep: receives the tuned modules of a block.
        passes: how often to train on each window that is not held out, if ``tokens`` is 0.
        weigh: returns the square root of the metric for a block's output error, or None to weight
            all directions equally.
        learning_rate: the peak.
        seed: draws the order of the data.

    Attributes:
        gains: the error of every tuned block on held-out windows, by name.
        seconds: the time spent.
    """

    def __init__(
        self,
        tokens: int,
        take: Take,
        keep: Keep,
        *,
        passes: int = 0,
        weigh: Callable[[str], Tensor | None] = lambda _: None,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
    ) -> None:
        """Start with no block tuned."""
        self._tokens, self._take, self._keep, self._weigh = tokens, take, keep, weigh
        self._passes, self._learning_rate, self._seed = passes, learning_rate, seed
        self.gains: dict[str, Gain] = {}
        self.seconds = 0.0

    def advance(
        self, name: str, block: nn.Module, given: Call, inputs: States, wanted: States
    ) -> bool:
        """Tune the fitted modules of a block, and run the inputs through it.

        Args:
            name: the block's dotted name.
            block: the dense block.
            given: its other arguments.
            inputs: hidden states of the compressed model, replaced by those after the block.
            wanted: the dense model's, after the block.

        Returns:
            False if nothing of the block is fitted, and the inputs are as they were.

        Raises:
            CalibrationError: if the block's output is not finite before it is tuned.
        """
        start = time.perf_counter()
        fitted = self._take(name)
        if not fitted:
            return False
        student = copy.deepcopy(block)
        local = {full.removeprefix(f"{name}."): module for full, module in fitted.items()}
        for where, module in local.items():
            student.set_submodule(where, module)
        norms = {where: student.get_submodule(where) for where in _norms(block)}
        tuned = {**local, **norms}
        stored = {where: _dtypes(module) for where, module in tuned.items()}
        dtype = _wide(student)
        student.to(dtype)
        parameters = {
            parameter: stored[where][key]
            for where, module in tuned.items()
            for key, parameter in module.named_parameters()
            if where not in local or parameter.requires_grad
        }
        call, root = _in_dtype(given, dtype), self._weigh(name)
        task = BlockTask(name, student, call, inputs, wanted, root, dtype)
        rate, seed = self._learning_rate, self._seed
        tokens = self._tokens or self._passes * task.tokens * len(split_windows(len(inputs))[0])
        self.gains[name] = tune(task, parameters, tokens, learning_rate=rate, seed=seed)
        for index, state in enumerate(inputs):
            inputs[index] = call_block(student, state.to(dtype), call).to(state.dtype)
        for where, module in tuned.items():
            _restore(module, stored[where])
        self._keep(name, {f"{name}.{where}": module for where, module in tuned.items()})
        self.seconds += time.perf_counter() - start
        return True

    def warn(self) -> None:
        """Log which blocks stay as they were fitted, because training did not help them."""
        left = [name for name, gain in self.gains.items() if not gain.kept]
        if left:
            logger.warning(
                "refinement did not lower the held-out error of %d of %d blocks, which stay as "
                "fitted: %s",
                len(left),
                len(self.gains),
                ", ".join(left[:3]) + (", ..." if len(left) > 3 else ""),
            )


def refine(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    refinement: Refinement,
    *,
    progress: bool = True,
) -> None:
    """Refine fitted modules block by block, without changing the model.

    Args:
        model: the dense model; its blocks must form one stack that can be walked.
        modules: dotted names of the fitted modules.
        batches: calibration data of one length, without padding.
        refinement: tunes each block.
        progress: show a progress bar.

    Raises:
        CalibrationError: if the blocks cannot be walked, or a block's output is not finite.
    """
    with eval_mode(model), torch.no_grad():
        blocks, calls = open_walk(model, modules, batches)
        compressed = first_states(model, blocks, batches)
        dense = States(model, compressed)
        bar = tqdm(blocks, desc="refining", unit="block", disable=not progress)
        for (name, block), call in zip(bar, calls, strict=True):
            advance(dense, block, call)
            if not refinement.advance(name, block, call, compressed, dense):
                advance(compressed, block, call)


def _wide(block: nn.Module) -> torch.dtype:
    """Return the dtype to train in: float32, or wider if the block is."""
    return functools.reduce(torch.promote_types, _dtypes(block).values(), torch.float32)


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every floating-point parameter and buffer, by name."""
    return {name: each.dtype for name, each in _tensors(module).items()}


def _restore(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, each in _tensors(module).items():
        each.data = each.data.to(dtypes[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: each for name, each in found.items() if each.is_floating_point()}


def _norms(block: nn.Module) -> list[str]:
    """Return the local names of the norms: leaf modules whose parameters are all vectors."""
    found = []
    for name, module in block.named_modules():
        own = list(module.parameters())
        if own and not list(module.children()) and all(p.dim() == 1 for p in own):
            found.append(name)
    return found


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return a block's other arguments with floating-point tensors in one dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        made = [_in_dtype(each, dtype) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {key: _in_dtype(each, dtype) for key, each in value.items()}
    return value
