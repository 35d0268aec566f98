"""Greedy choice of the variables that best predict the others: orthogonal least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.decompositions.nystrom import ridged
from tnlm.utils.ties import greatest

PANEL = 256
"""Number of variables taken before the moments of all others are updated, in one product."""


def greedy_order(
    moment: Tensor, weighed: Tensor, batch: int, least: int
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Order variables, best first, in batches; each takes those that reduce the error most.

    The error is what linear predictions from the variables taken leave of ``x @ weighed``, for
    inputs x with the given second moment.

    Args:
        moment: second moment of the variables, ``(n, n)``, float64.
        weighed: ``(n, out)``, float64.
        batch: number of variables taken in a step.
        least: number of variables after which to stop.

    Returns:
        The variables taken, and after every step their number and the squared error left.

    Source: Chen, Cowan and Grant 1991.

    Example:
        >>> moment = torch.diag(torch.tensor([1.0, 4.0, 2.0])).double()
        >>> taken, path = greedy_order(moment, torch.ones(3, 1).double(), 1, 2)
        >>> taken.tolist(), [(count, round(left, 6)) for count, left in path]
        ([1, 2], [(0, 7.0), (1, 3.0), (2, 1.0)])
    """
    rest = _Rest(moment, weighed)
    taken: list[Tensor] = []
    path = [(0, rest.left)]
    while path[-1][0] < least:
        taken.append(rest.take(batch))
        path.append((path[-1][0] + len(taken[-1]), max(rest.left, 0.0)))
    return torch.cat(taken), path


class _Rest:
    """What the variables taken leave unexplained of the others.

    Given those taken, the moment of the others is ``moment - known @ scores``. A step needs only
    its diagonal and a few columns, so the rest waits until `PANEL` variables are taken; it then
    shrinks to the variables that are free.
    """

    _known: Tensor
    _scores: Tensor

    def __init__(self, moment: Tensor, weighed: Tensor) -> None:
        self._moment = moment
        self._effect = moment @ weighed  # explained by each, given those taken
        self.left = float((self._effect * weighed).sum())
        self._floor = 1e-12 * float(moment.diagonal().max())
        self._names = torch.arange(len(moment), device=moment.device)
        self._start_panel()

    def take(self, batch: int) -> Tensor:
        """Take the free variables that explain most, and return them."""
        gain = self._effect.norm(dim=1).square() / self._spread.clamp_min(self._floor or 1.0)
        gain[self._spread <= self._floor] = 0.0
        gain[~self._free] = -1.0
        best = greatest(gain, min(batch, int(self._free.sum())))
        self._free[best] = False
        columns = self._moment[best].T - self._known @ self._scores[:, best]
        wanted = torch.cat([columns.T, self._effect[best]], dim=1)
        solved = torch.linalg.solve(ridged(columns[best]), wanted)
        scores, change = solved[:, : len(columns)], solved[:, len(columns) :]
        self.left -= float((self._effect[best] * change).sum())
        self._effect.addmm_(columns, change, alpha=-1.0)
        self._spread -= (columns * scores.T).sum(1)
        self._known = torch.cat([self._known, columns], dim=1)
        self._scores = torch.cat([self._scores, scores])
        found = self._names[best]
        if len(self._scores) >= PANEL:
            self._shrink()
        return found

    def _start_panel(self) -> None:
        self._free = torch.ones(len(self._moment), dtype=torch.bool, device=self._moment.device)
        self._spread = self._moment.diagonal().clone()
        self._known, self._scores = self._moment[:, :0], self._moment[:0]

    def _shrink(self) -> None:
        """Keep the free variables, with their moment given all taken."""
        free = self._free.nonzero().flatten()
        self._moment = self._moment.index_select(0, free).index_select(1, free)
        self._moment.addmm_(self._known[free], self._scores.index_select(1, free), alpha=-1.0)
        self._effect, self._names = self._effect[free], self._names[free]
        self._start_panel()
