"""Streaming statistics of the inputs of matrices: second moment, mean and mean magnitude."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.merging import merge, merged_counts
from tnlm.calibration.opening import open_store
from tnlm.calibration.padding import Padding
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import stream
from tnlm.errors import CalibrationError
from tnlm.parallel.workers import ALONE, Workers
from tnlm.tensors.exact import rounded
from tnlm.tensors.symmetric import add_outer
from tnlm.utils.memory import release

__all__ = ["Statistics", "collect"]

logger = logging.getLogger("tnlm")

ROWS = 1024
"""Number of tokens multiplied at once."""


class Accumulator(Protocol):
    """Sums statistics over batches."""

    def end_batch(self) -> None:
        """Finish the current batch."""

    def flush(self, store: Statistics) -> None:
        """Move all sums to a store, as means, and reset them."""


class _Inputs:
    """Sums over tokens for the watched modules, computed once for modules with the same input."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.rows: dict[str, int] = {}
        self.most = 0
        self.leaders: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor, padding: Padding | None) -> None:
        """Add the input of a module; without ``padding``, all rows count."""
        if self._last is not None and self._last[1] is x:
            self.leaders.setdefault(name, self._last[0])
        self._last = (self.leaders.setdefault(name, name), x)
        if self.leaders[name] != name:
            return
        if name not in self.sums:
            size, vector = x.shape[-1], x.new_zeros(x.shape[-1], dtype=torch.float64)
            square = vector.new_zeros(size, size)
            self.sums[name] = {"moment": square, "mean": vector, "magnitude": vector.clone()}
            self.rows[name] = 0
        sums, rows = self.sums[name], counted_rows(name, x, padding)
        self.rows[name] += len(rows)
        for part in rows.split(ROWS):
            part = part.float()
            size = part.abs().sum(0, dtype=torch.float64)
            add_outer(sums["moment"], part)
            sums["mean"] += rounded(part.sum(0, dtype=torch.float64), size)
            sums["magnitude"] += rounded(size, size)

    def end_batch(self) -> None:
        """Forget the inputs, which modules share only within a batch."""
        self._last = None

    def flush(self, store: Statistics) -> None:
        """Move all sums to a store, as means over inputs, and reset them.

        Most modules have one input per token, a pooler one per sequence, a shared layer several.
        """
        self._merge()
        for leader, sums in self.sums.items():
            count = self.rows[leader]
            if not count:  # called, but only with padding
                continue
            members = [name for name, other in self.leaders.items() if other == leader]
            check_finite(f"inputs of {leader}", sums)
            with torch.inference_mode(False):  # the store's tensors may be used in graphs later
                means = {name: (total / count).cpu() for name, total in sums.items()}
                store.put(leader, members, {**means, "count": torch.tensor(self.rows[leader])})
        self.most = max(self.most, *self.rows.values(), 0)
        self.sums.clear()
        self.rows.clear()

    def _merge(self) -> None:
        """Take over the sums of all processes."""
        if self._workers.size > 1:
            merge(self.sums, self._workers)
            self.rows = merged_counts(self.rows, self._workers)
            found = self._workers.gather(self.leaders)
            self.leaders = {k: v for leaders in reversed(found) for k, v in leaders.items()}


def counted_rows(name: str, x: Tensor, padding: Padding | None) -> Tensor:
    """Return the rows of ``x`` that are not padding, ``(rows, width)``.

    Args:
        name: the module with the input or output ``x``.
        x: ``(..., width)``.
        padding: masks of the batch, or None without padding.

    Raises:
        CalibrationError: if the masks do not fit.
    """
    x = x.detach()
    return x.reshape(-1, x.shape[-1]) if padding is None else padding.counted(name, x)


def check_finite(what: str, sums: dict[str, Tensor]) -> None:
    """Raise `CalibrationError` unless all sums are finite."""
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise CalibrationError(
            f"the {what} are not finite on the calibration data; check the model's weights and "
            "dtype"
        )


def collect(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> Statistics:
    """Run calibration data through a model, and return statistics of modules' inputs.

    They are means over inputs x, float64: ``moment`` C = E[x x.T] ``(in, in)``, ``mean`` E[x] and
    ``magnitude`` E|x|, both ``(in,)``; ``count`` is the number of inputs.

    Args:
        model: run in eval mode, without gradients; left unchanged.
        modules: dotted names of the modules to watch; those that no token reaches get no
            statistics.
        batches: from :func:`tnlm.calibration.data.token_batches`; padding is not counted.
        cache_dir: cache of the statistics, under a hash of weights, modules and data.
        progress: show a progress bar.
        workers: share out the batches.

    Raises:
        CalibrationError: if no module is reached, or an input is not finite.

    Source: the moment as in SVD-LLM (arXiv 2403.07378), the magnitude as in AWQ (arXiv
    2306.00978) and ASVD (arXiv 2312.05821).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> batches = [{"input_ids": torch.arange(8).reshape(1, 8),
        ...             "attention_mask": torch.ones(1, 8, dtype=torch.int64)}]
        >>> found = collect(model, ["transformer.h.0.mlp.c_fc"], batches, progress=False)
        >>> found.tensor("transformer.h.0.mlp.c_fc", "mean").shape
        torch.Size([4])
    """
    store = open_store(cache_dir, count_tokens(batches), model, modules, batches, "inputs", workers)
    if store.complete:
        return store
    inputs, title = _Inputs(workers), "calibrating" if progress else None
    shares = stream(model, modules, batches, inputs.see, store.trail, workers)
    fill(store, inputs, shares, modules, len(batches), title, workers)
    widest = max(_width(model.get_submodule(name)) for name in store.leaders)
    if inputs.most < widest:
        logger.warning(
            "%d calibration tokens for matrices of up to %d columns: directions without data are "
            "damped; use more data for a better fit",
            inputs.most,
            widest,
        )
    return store


def fill(
    store: Statistics,
    accumulator: Accumulator,
    shares: Generator[float, None, None],
    modules: Sequence[str],
    batches: int,
    title: str | None,
    workers: Workers = ALONE,
) -> None:
    """Run all passes, and store the statistics that an accumulator computes.

    Args:
        store: complete afterwards.
        accumulator: called by the passes.
        shares: the passes; yields after every batch, and 0 when the modules processed so far are
            complete.
        modules: the watched modules, at least one of which must be reached.
        batches: the sum of the shares.
        title: title of the progress bar; None for no bar.
        workers: share out the batches.

    Raises:
        CalibrationError: if no module is reached, or a sum is not finite.
    """
    done = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with (
        contextlib.closing(shares),  # the model is restored before an error is raised
        tqdm(total=1.0, desc=title, bar_format=done, disable=title is None) as bar,
    ):
        for share in shares:
            bar.update(min(share * workers.size / batches, 1.0 - bar.n))
            accumulator.end_batch()
            if share == 0:  # a block is done: its sums are complete
                accumulator.flush(store)
                store.mark()
                release()
    if workers.rank == 0:
        check_reached(store, modules)
        store.save_index()
    workers.gather(None)  # until process 0 has written what the others read
    if workers.rank > 0:
        store.save_index()


def check_reached(store: Statistics, modules: Sequence[str]) -> None:
    """Raise `CalibrationError` if the data reached none of the modules."""
    if modules and not any(name in store.leaders for name in modules):
        raise CalibrationError(
            f"the calibration data reached none of the modules, such as {modules[0]}: the model "
            "does not call them on it; choose other targets, or give data that they see"
        )


def _width(module: nn.Module) -> int:
    return int(getattr(module, "in_features", 0) or getattr(module, "nx", 0))
