"""Alternates between the factors of matrices around a residual stream, and its rotation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnlm.decompositions.als import als
from tnlm.decompositions.whitening import rebuild
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors, Network
from tnlm.tensors.procrustes import Procrustes

STALL = 1e-2
"""Relative gain of a round below which it is the last."""


@dataclass(frozen=True)
class Piece:
    """A matrix that reads or writes a residual stream, with its approximation, in one basis.

    Attributes:
        place: the norm whose output it reads, or its own name: pieces of one place weight the
            stream alike.
        reads: whether the stream is its input side; otherwise its output side.
        weight: W, ``(out, in)``, float64.
        metric: of its error.
        network: of its factors.
        factors: the approximation K.
        importance: the effect of a unit of its squared error.
    """

    place: str
    reads: bool
    weight: Tensor
    metric: Metric
    network: Network
    factors: Factors
    importance: float = 1.0

    @property
    def error(self) -> float:
        """The squared error in the metric, times the importance."""
        return self.importance * self.metric.norm(self.weight - self.fit, keep=False) ** 2

    @property
    def fit(self) -> Tensor:
        """K, ``(out, in)``."""
        return rebuild(self.network, self.factors)

    @property
    def weighting(self) -> Tensor:
        """A: how errors along the stream are weighted."""
        side = self.metric.inputs if self.reads else self.metric.outputs
        size = self.weight.shape[1 if self.reads else 0]
        if side is None:
            return torch.eye(size).to(self.weight)
        return side.values.diag() if side.is_diagonal else side.values

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return B and L of the piece; see `tnlm.tensors.procrustes.Procrustes`."""
        fit = self.fit
        rows = fit.T if self.reads else fit
        side = self.metric.outputs if self.reads else self.metric.inputs
        inner = (rows if side is None else side.apply(rows)) @ rows.T
        pull = pull_of(self.weight, fit, self.metric, reads=self.reads)
        return self.importance * inner, self.importance * pull

    def turned(self, rotation: Tensor) -> Piece:
        """Return the matrix in a basis rotated by Q, with least-squares factors there."""
        turn, metric = rotation.to(self.weight), self.metric
        weight = self.weight @ turn if self.reads else turn.T @ self.weight
        outputs, inputs = metric.outputs, metric.inputs
        if self.reads:
            inputs = None if inputs is None else inputs.turned(turn)
        else:
            outputs = None if outputs is None else outputs.turned(turn)
        there = Metric(outputs, inputs)
        factors = als(self.network, weight, there, self.factors).factors
        return replace(self, weight=weight, metric=there, factors=factors)


def pull_of(weight: Tensor, fit: Tensor, metric: Metric, *, reads: bool) -> Tensor:
    """Return L of a matrix W and its fit K: ``C W.T G K`` if it reads, otherwise ``G W C K.T``."""
    pulled = metric.pull(weight)
    return pulled.T @ fit if reads else pulled @ fit.T


def alternate(pieces: list[Piece], rounds: int) -> tuple[Tensor, list[float]]:
    """Alternate between a rotation given factors, and factors given the rotation.

    Args:
        pieces: the matrices; replaced by their versions in the new basis.
        rounds: most rounds.

    Returns:
        The rotation, and the total squared error at the start and after every round, which never
        rises.
    """
    width = pieces[0].weight.shape[1 if pieces[0].reads else 0]
    rotation = torch.eye(width).to(pieces[0].weight)
    errors = [sum(piece.error for piece in pieces)]
    for _ in range(rounds):
        turn = _problem(pieces).solve()
        for place, piece in enumerate(pieces):
            pieces[place] = piece.turned(turn)
        rotation = rotation @ turn
        errors.append(sum(piece.error for piece in pieces))
        if errors[-2] - errors[-1] <= STALL * errors[-2]:
            break
    return rotation, errors


def _problem(pieces: list[Piece]) -> Procrustes:
    """Return the problem of the rotation, in which pieces of one place share their weighting."""
    weightings: dict[str, Tensor] = {}
    inners: dict[str, Tensor] = {}
    total = torch.zeros(())
    for piece in pieces:
        inner, pull = piece.terms()
        weightings.setdefault(piece.place, piece.weighting)
        inners[piece.place] = inners[piece.place] + inner if piece.place in inners else inner
        total = total.to(pull) + pull
    return Procrustes([(weightings[place], inners[place]) for place in inners], total)
