"""Weighted orthogonal Procrustes: the rotation under which fixed approximations fit best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALVINGS = 12
"""Most halvings of a step before no descent is left."""
STEPS, SPENT = 20, 1e-2
"""Most steps, and the gain, relative to all gain so far, below which a step is the last."""


@dataclass(frozen=True)
class Procrustes:
    """The function ``f(Q) = sum of tr(Q.T A Q B) - 2 tr(Q.T L)`` of orthogonal Q, ``(n, n)``.

    It is the part of a squared error ``||G^(1/2) (W - Q K) C^(1/2)||^2`` that depends on Q, with
    A = G, B = K C K.T and L = G W C K.T; likewise for ``W - K Q.T``. With A = 1 this is the
    orthogonal Procrustes problem, which L's polar factor solves; otherwise there is no closed form.

    Attributes:
        pairs: A and B of every term, symmetric positive semi-definite.
        pull: L, summed over the terms.

    Source: ProcrustesGPT (arXiv 2506.02818) for its use; weighted form: Koschat and Swayne 1991.

    Example:
        >>> turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        >>> turn[:, 0] *= torch.linalg.det(turn).sign()  # no reflection: it has to be near
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> problem = Procrustes([(eye, eye)], turn)
        >>> problem.value(problem.solve()) <= problem.value(eye)
        True
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    pull: Tensor

    def value(self, rotation: Tensor) -> float:
        """Return f(Q)."""
        return self._look(rotation).value

    def solve(self, steps: int = STEPS, spent: float = SPENT) -> Tensor:
        """Return a rotation that improves on the identity, by descent that never raises f.

        Every step is the gradient over pairs of axes, each divided by the curvature along its
        plane as in Gauss and Newton's method, on the path of Cayley's transform.

        Args:
            steps: most steps.
            spent: a step that adds less than this fraction to the gain is the last.
        """
        here = self._look(torch.eye(len(self.pull)).to(self.pull))
        first, length = here.value, 1.0
        for _ in range(steps):
            better = self._lower(here, length)
            if better is None:
                break
            gain, (here, length) = here.value - better[0].value, better
            if gain <= spent * (first - here.value):
                break
            length *= 2.0
        return here.rotation

    def _lower(self, here: _Look, length: float) -> tuple[_Look, float] | None:
        """Return a lower point along the step, with the step's length; None if there is none."""
        step = here.step
        for _ in range(HALVINGS):
            there = self._look(here.rotation @ cayley(length * step))
            if there.value < here.value:
                return there, length
            length /= 2.0
        return None

    def _look(self, rotation: Tensor) -> _Look:
        summed, curvature = torch.zeros_like(self.pull), torch.zeros_like(self.pull)
        for weights, inner in self.pairs:
            weighted = weights @ rotation
            summed += weighted @ inner
            along = (rotation * weighted).sum(0)
            curvature += torch.outer(along, inner.diagonal())
        value = float((rotation * (summed - 2.0 * self.pull)).sum())
        slope = rotation.T @ (summed - self.pull)
        curvature = curvature + curvature.T
        floor = float(curvature.mean()) * torch.finfo(curvature.dtype).eps
        step = -(slope - slope.T) / curvature.clamp_min(floor or 1.0)
        return _Look(rotation, value, step)


@dataclass(frozen=True)
class _Look:
    """A rotation, its value, and the step from it, skew-symmetric."""

    rotation: Tensor
    value: float
    step: Tensor


def cayley(skew: Tensor) -> Tensor:
    """Return the rotation ``(1 - S/2)^-1 (1 + S/2)`` of a skew-symmetric S, near exp(S).

    Example:
        >>> turn = cayley(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        >>> turn.round(decimals=6).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    eye = torch.eye(len(skew)).to(skew)
    rotation: Tensor = torch.linalg.solve(eye - skew / 2, eye + skew / 2)
    return rotation
