"""The increase of the loss when experts are dropped, measured on the outputs of their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.padding import Padding
from tnlm.calibration.routing import one_expert, routed
from tnlm.calibration.statistics import check_finite, counted_rows, fill
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import stream
from tnlm.targets.routing import Mixture, fewer
from tnlm.targets.stubs import copied

CHUNK = 512
"""Tokens for which the outputs of all experts are held at once."""
GROWS = 1.0 + 1e-9
"""Least growth from one increment to the next, so that sorting them restores their order."""


def collect_removal(
    model: PreTrainedModel,
    mixtures: Sequence[Mixture],
    batches: Sequence[Batch],
    gradient: Callable[[str], Tensor],
    *,
    progress: bool = True,
) -> Statistics:
    """Return the second-order increase of the loss when experts are dropped.

    D is the change of a block's output at a token when its router chooses among the experts that
    stay, and G = E[g g.T] is the second moment of the loss's gradients at the experts' output. A
    set of dropped experts then costs E[D.T G D], a mean over tokens, in the unit of tr(G E C E.T)
    for a matrix. The sets are nested: their order is greedy in the form H_ij = E[D_i.T G D_j] of
    single removals, and each is then measured as a whole, since two dropped experts may have been
    each other's second choice.

    The statistic ``removal`` ``(experts,)``, float64, of a module of experts holds the increments
    of the cost in the order of removal, made not to fall. The sum of the smallest is therefore at
    least the measured cost of dropping these. Experts beyond the number that must stay have the
    largest.

    Args:
        model: run in eval mode, without gradients; left as it was.
        mixtures: the blocks.
        batches: calibration sequences; padding is not counted.
        gradient: returns G ``(width, width)`` of a module of experts, by its name.
        progress: show a progress bar.

    Raises:
        CalibrationError: if no block is reached, or an output is not finite.

    Source: second-order saliency as in Optimal Brain Damage (LeCun, Denker and Solla 1989), with
    the output moment of K-FAC (Martens and Grosse 2015).
    """
    blocks, paths = [m.block for m in mixtures], [m.path for m in mixtures]
    single, store = (Statistics(tokens=count_tokens(batches)) for _ in range(2))
    pairs = _Costs(model, mixtures, gradient)
    shares = stream(model, blocks, batches, pairs.see)
    fill(single, pairs, shares, paths, len(batches), "removals" if progress else None)
    orders = {path: _order(single.tensor(path, "costs")) for path in single.leaders}
    nested = _Costs(model, mixtures, gradient, orders)
    shares = stream(model, blocks, batches, nested.see)
    fill(store, nested, shares, paths, len(batches), "nested removals" if progress else None)
    return store


class _Costs:
    """Sums of the costs of removals: of every pair, or of nested sets in an order."""

    def __init__(
        self,
        model: nn.Module,
        mixtures: Sequence[Mixture],
        gradient: Callable[[str], Tensor],
        orders: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._gradient, self._orders = model, gradient, orders
        self._mixtures = {mixture.block: mixture for mixture in mixtures}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def see(self, name: str, x: Tensor, padding: Padding | None) -> None:
        """Add the tokens of a block's input."""
        mixture, rows = self._mixtures[name], counted_rows(name, x, padding)
        form = self._gradient(mixture.path).to(rows.device, torch.float32)
        for part in rows.split(CHUNK):
            changes = _changes(self._model, mixture, part, self._kept(mixture)).float()
            costs = torch.einsum("itw,jtw->ij", changes @ form, changes).double().cpu()
            self._sums[name] = self._sums[name] + costs if name in self._sums else costs
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)

    def _kept(self, mixture: Mixture) -> list[Tensor]:
        """Return the experts that stay, for every removal."""
        if self._orders is None:
            every = torch.arange(mixture.count)
            return [every[every != gone] for gone in every]
        order = self._orders[mixture.path]
        most = mixture.count - mixture.active
        return [order[gone:].sort().values for gone in range(1, most + 1)]

    def end_batch(self) -> None:
        """Do nothing, since tokens are added one by one."""

    def flush(self, store: Statistics) -> None:
        """Move all means to a store."""
        for name, sums in self._sums.items():
            path, means = self._mixtures[name].path, sums / self._tokens[name]
            check_finite(f"outputs of experts in {name}", {"removal": means})
            if self._orders is None:
                store.put(path, [path], {"costs": means})
            else:
                increments = _increments(means.diagonal(), self._orders[path])
                store.put(path, [path], {"removal": increments})
        self._sums.clear()


def _changes(model: nn.Module, mixture: Mixture, x: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Return the changes of a block's output, ``(sets, tokens, width)``, for sets that stay."""
    block = model.get_submodule(mixture.block)
    inner, gate = block.get_submodule(mixture.experts), block.get_submodule(mixture.router)
    states = routed(model, mixture, x)[0]
    outputs = torch.stack([one_expert(inner, e, states) for e in range(mixture.count)])

    def run(others: dict[nn.Module, nn.Module]) -> Tensor:
        output: Any = copied(block, others)(x.unsqueeze(0))
        first: Tensor = output[0] if isinstance(output, tuple | list) else output
        return first.reshape(len(states), -1)

    whole = run({inner: _Known(outputs)})
    smaller = [
        run({inner: _Known(outputs[some]), gate: fewer(gate, mixture.count, some)}) for some in kept
    ]
    return torch.stack(smaller) - whole


class _Known(nn.Module):
    """Stands for experts whose outputs are known, ``(experts, tokens, width)``."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = torch.arange(len(index), device=index.device)
        chosen = self._outputs[index, rows.unsqueeze(1)]  # (tokens, active, width)
        summed: Tensor = (chosen * weights.unsqueeze(-1)).sum(1).to(states.dtype)
        return summed.view_as(states)


def _order(pairs: Tensor) -> Tensor:
    """Return the experts in the order in which dropping one more costs least.

    Example:
        >>> _order(torch.tensor([[1.0, 5.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 4.0]])).tolist()
        [0, 2, 1]
    """
    left = list(range(len(pairs)))
    cost = pairs.diagonal().clone()
    order = []
    while left:
        best = min(left, key=lambda expert: float(cost[expert]))
        left.remove(best)
        order.append(best)
        cost += 2 * pairs[best]
    return torch.tensor(order)


def _increments(costs: Tensor, order: Tensor) -> Tensor:
    """Return every expert's increment of the costs of nested removals; they do not fall.

    Example:
        >>> found = _increments(torch.tensor([1.0, 4.0]), torch.tensor([2, 0, 1]))
        >>> found.round(decimals=6).tolist()
        [3.0, 3.0, 1.0]
    """
    found = torch.zeros(len(order), dtype=torch.float64)
    last = total = 0.0
    for place, expert in enumerate(order.tolist()):
        cost = float(costs[place]) if place < len(costs) else total
        last = max(cost - total, last * GROWS)
        found[expert] = last
        total += last
    return found
