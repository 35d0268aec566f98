"""Least squares for slices that share bases and have cores of their own, each in its own metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnlm.decompositions.normal import inverse
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

STEPS, STALL = 6, 1e-2
"""Conjugate gradients on a basis in every sweep; a sweep that gains a smaller share is the last."""


@dataclass(frozen=True)
class Slice:
    """A matrix W ``(out, in)``, the forms G and C of its metric, and ``G W C``."""

    weight: Tensor
    outputs: Side | None
    inputs: Side | None
    pulled: Tensor

    @classmethod
    def of(cls, weight: Tensor, metric: Metric) -> Slice:
        """Return a matrix with its metric."""
        weight = weight.detach().double()
        return cls(weight, metric.outputs, metric.inputs, metric.pull(weight))

    @property
    def turned(self) -> Slice:
        """The transposed matrix."""
        return Slice(self.weight.T, self.inputs, self.outputs, self.pulled.T)

    def core(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Return the best K in ``U K V.T``; a basis that is None is the identity."""
        found = self.pulled
        if left is None and right is None:
            return self.weight
        if left is None:
            found = _times(self.weight, self.inputs)
        elif right is None:
            found = _times(self.weight.T, self.outputs).T
        if left is not None:
            found = inverse(_within(left, self.outputs)) @ (left.T @ found)
        if right is not None:
            found = (found @ right) @ inverse(_within(right, self.inputs))
        return found

    def gained(self, left: Tensor | None, core: Tensor, right: Tensor | None) -> float:
        """Return by how much the best core lowers the squared norm of the matrix."""
        half = self.pulled if right is None else self.pulled @ right
        return float((core * (half if left is None else left.T @ half)).sum())


@dataclass(frozen=True)
class Bases:
    """Bases U ``(out, rank)`` and V ``(in, rank)`` of some slices; None stands for the identity."""

    left: Tensor | None
    right: Tensor | None

    def cores(self, slices: Sequence[Slice]) -> list[Tensor]:
        """Return the best core of every slice."""
        return [each.core(self.left, self.right) for each in slices]

    def improved(self, slices: Sequence[Slice], sweeps: int) -> tuple[Bases, list[float]]:
        """Return better bases, and the squared error at the start and after every half-step.

        For fixed bases the best cores are known, so that the error is a function of the bases
        alone. Each in turn takes a few conjugate gradients with the cores fixed, from the basis
        that there is; then the cores follow. So the error never rises.

        Source: alternating least squares; cores eliminated as in variable projection (Golub and
        Pereyra 1973); conjugate gradients: Hestenes and Stiefel 1952.
        """
        found, turned = self, [each.turned for each in slices]
        size = sum(float((each.weight * each.pulled).sum()) for each in slices)
        history = [size - _gained(found, slices)]
        columns = None if found.right is None else _inverse_sum(slices)
        rows = None if found.left is None else _inverse_sum(turned)
        for _ in range(sweeps):
            before = history[-1]
            for half in ("right", "left"):
                newer = found
                if half == "right" and columns is not None and found.right is not None:
                    newer = replace(found, right=_better(found.left, found.right, slices, columns))
                elif half == "left" and rows is not None and found.left is not None:
                    newer = replace(found, left=_better(found.right, found.left, turned, rows))
                left = size - _gained(newer, slices)
                # Near an exact fit rounding could make the newer ones worse.
                found, error = (newer, left) if left < history[-1] else (found, history[-1])
                history.append(error)
            if before - history[-1] <= STALL * before:
                break
        return found, history


def _gained(bases: Bases, slices: Sequence[Slice]) -> float:
    cores = bases.cores(slices)
    return sum(
        each.gained(bases.left, core, bases.right) for each, core in zip(slices, cores, strict=True)
    )


def _inverse_sum(slices: Sequence[Slice]) -> Tensor:
    """Return the inverse of the sum of the forms on the inputs."""
    forms = [_full(each.inputs, each.weight.shape[1]) for each in slices]
    return inverse(torch.stack(forms).sum(0))


def _better(left: Tensor | None, right: Tensor, slices: Sequence[Slice], outer: Tensor) -> Tensor:
    """Return a better V, ``(in, rank)``, for U and the present cores.

    The normal equations are ``sum of C_s V Q_s = sum of (G_s W_s C_s).T U K_s`` with Q_s = K_s.T
    U.T G_s U K_s; the preconditioner is the inverse of the sum of the C_s and that of the Q_s.
    """
    basis: Tensor = torch.linalg.qr(right)[0]
    cores = Bases(left, basis).cores(slices)
    sent = [core if left is None else left @ core for core in cores]
    inner = [_within(each, s.outputs) for each, s in zip(sent, slices, strict=True)]
    wanted = torch.stack([s.pulled.T @ each for s, each in zip(slices, sent, strict=True)]).sum(0)
    forms = [s.inputs for s in slices]
    within = inverse(torch.stack(inner).sum(0))

    def normal(v: Tensor) -> Tensor:
        parts = [_times(v.T, form).T @ q for form, q in zip(forms, inner, strict=True)]
        return torch.stack(parts).sum(0)

    residual = wanted - normal(basis)
    towards = direction = outer @ residual @ within
    slope = float((residual * towards).sum())
    for _ in range(STEPS):
        change = normal(direction)
        curvature = float((direction * change).sum())
        if not (slope > 0 and curvature > 0):
            break
        basis = basis + slope / curvature * direction
        residual = residual - slope / curvature * change
        towards = outer @ residual @ within
        before, slope = slope, float((residual * towards).sum())
        direction = towards + slope / before * direction
    return basis


def _times(rows: Tensor, form: Side | None) -> Tensor:
    return rows if form is None else form.apply(rows)


def _within(columns: Tensor, form: Side | None) -> Tensor:
    """Return ``X.T S X``."""
    return _times(columns.T, form) @ columns


def _full(form: Side | None, size: int) -> Tensor:
    if form is None:
        return torch.eye(size, dtype=torch.float64)
    full: Tensor = form.values.diag() if form.is_diagonal else form.values
    return full
