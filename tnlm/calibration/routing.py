"""REAP's score: the average contribution of each routed expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.opening import open_store
from tnlm.calibration.padding import Padding
from tnlm.calibration.statistics import check_finite, counted_rows, fill
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import stream
from tnlm.targets.routing import Mixture, Recorder
from tnlm.targets.stubs import copied


class _Scores:
    """Sums of gate times output norm over the tokens of each expert."""

    def __init__(self, model: nn.Module, mixtures: Sequence[Mixture]) -> None:
        self._model = model
        self._mixtures = {mixture.block: mixture for mixture in mixtures}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, padding: Padding | None) -> None:
        """Add the tokens of a block's input."""
        mixture = self._mixtures[name]
        states, index, weights = routed(self._model, mixture, counted_rows(name, x, padding))
        experts = self._model.get_submodule(mixture.path)
        if name not in self._sums:
            self._sums[name] = torch.zeros(mixture.count, dtype=torch.float64)
            self._counts[name] = torch.zeros(mixture.count, dtype=torch.float64)
        for expert in index.unique().tolist():
            rows, slots = (index == expert).nonzero(as_tuple=True)
            norms = one_expert(experts, expert, states[rows]).float().norm(dim=1)
            self._sums[name][expert] += (weights[rows, slots].double() * norms).sum().cpu()
            self._counts[name][expert] += len(rows)

    def end_batch(self) -> None:
        """Do nothing, since tokens are added one by one."""

    def flush(self, store: Statistics) -> None:
        """Move all means to a store."""
        for name, sums in self._sums.items():
            counts = self._counts[name]
            means = {"reap": sums / counts.clamp_min(1.0), "routed": counts}
            check_finite(f"outputs of experts in {name}", means)
            path = self._mixtures[name].path
            store.put(path, [path], means)
        self._sums.clear()
        self._counts.clear()


def routed(model: nn.Module, mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of a block's experts: states, indices and weights.

    Args:
        model: the model with the block, which is run without its experts and hooks.
        mixture: the block.
        x: tokens of its input, ``(tokens, width)``.
    """
    block, recorder = model.get_submodule(mixture.block), Recorder()
    copied(block, {model.get_submodule(mixture.path): recorder})(x.unsqueeze(0))
    states, index, weights = recorder.calls[-1]
    return states.reshape(-1, states.shape[-1]), index, weights


def one_expert(experts: nn.Module, expert: int, states: Tensor) -> Tensor:
    """Return the outputs of one expert, ``(tokens, width)``, without the gate."""
    index = torch.full((len(states), 1), expert, device=states.device)
    plain: nn.Module = copied(experts, {})
    output: Tensor = plain(states, index, states.new_ones(len(states), 1))
    return output


def collect_routing(
    model: PreTrainedModel,
    mixtures: Sequence[Mixture],
    batches: Sequence[Batch],
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration data through a model, and return the scores of its experts.

    By name of each experts module, these are ``reap`` ``(experts,)``, REAP's score, which is the
    mean over an expert's tokens of its gate times the norm of its output, and ``routed``
    ``(experts,)``, the number of these tokens. An expert without tokens has score 0.

    Args:
        model: run in eval mode, without gradients; left unchanged.
        mixtures: the blocks.
        batches: from :func:`tnlm.calibration.data.token_batches`; padding is not counted.
        cache_dir: cache of the statistics.
        progress: show a progress bar.

    Raises:
        CalibrationError: if no block is reached, or an output is not finite.

    Source: REAP, Lasby et al. 2025, arXiv 2510.13999, equation 9.
    """
    modules = [mixture.block for mixture in mixtures]
    store = open_store(cache_dir, count_tokens(batches), model, modules, batches, "routing")
    if not store.complete:
        scores = _Scores(model, mixtures)
        shares = stream(model, modules, batches, scores.see)
        title = "routing" if progress else None
        fill(store, scores, shares, [m.path for m in mixtures], len(batches), title)
    return store
