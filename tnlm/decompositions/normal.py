"""The normal matrix of one factor in a least-squares problem, and its (approximate) inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.decompositions.whitening import whiten
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.network import Network

DIRECT = 256
"""Up to this size, the normal matrix of a factor is formed and inverted."""

NEGLIGIBLE = 1e-12
"""Eigenvalues of a normal matrix below this fraction of the largest are treated as zero."""

Solve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Normal:
    """The normal matrix of a factor under a metric, with the other factors fixed.

    A small one is formed and inverted. Otherwise the metric is approximated as separable over the
    modes, and the inverse is a Kronecker product of small inverses: of the side of every open mode
    of the factor, and of the Gram matrix over the bonds of every part of the network.

    Attributes:
        network: the network of all factors.
        name: the factor.
        metric: how the error is measured.
        sides: the side of every open mode, nearest to the metric.
        inverses: the inverses of the sides that are not None.
        parts: the modes of every part to which the other factors are contracted.
    """

    network: Network
    name: str
    metric: Metric
    sides: Mapping[str, Side | None]
    inverses: Mapping[str, Tensor]
    parts: tuple[str, ...]

    def inverse(self, others: Sequence[Tensor]) -> Solve:
        """Return a function that multiplies a factor by the inverse, given the contracted parts."""
        modes = self.network.factors[self.name]
        system = self._system_modes()
        if system is not None and self.network.size(system) <= DIRECT:
            return _along(modes, [(system, inverse(self._matrix(system, others)))])
        found = [(mode, self.inverses[mode]) for mode in modes if mode in self.inverses]
        for part, tensor in zip(self.parts, others, strict=True):
            bonds = "".join(mode for mode in part if mode in modes and mode not in self.sides)
            found.append((bonds, inverse(_gram(part, tensor, bonds, self.sides))))
        return _along(modes, found)

    def _system_modes(self) -> str | None:
        """Return the modes that the normal equations couple, or None if they do not separate.

        If the outputs are not weighted, all rows of the factor along out modes share one system
        over its bonds and in modes; likewise with outputs and inputs exchanged.
        """
        modes = self.network.factors[self.name]
        shared = any(mode in part for part in self.parts for mode in modes if mode in self.sides)
        if shared or not self.metric.separable:
            return None
        free = self.network.out if self.metric.outputs is None else ""
        free += self.network.inp if self.metric.inputs is None else ""
        return "".join(mode for mode in modes if mode not in free)

    def _matrix(self, system: str, others: Sequence[Tensor]) -> Tensor:
        """Return the normal matrix over the coupled modes, by one einsum of two copies."""
        number = {mode: index for index, mode in enumerate(self.network.sizes)}
        twin = {mode: index + len(number) for mode, index in number.items()}
        operands: list[object] = []
        for modes, side in (
            (self.network.out, self.metric.outputs),
            (self.network.inp, self.metric.inputs),
        ):
            if side is None:
                twin |= {mode: number[mode] for mode in modes}
                continue
            sizes = [self.network.sizes[mode] for mode in modes]
            operands += [
                _full(side).reshape(sizes + sizes),
                [t[m] for t in (number, twin) for m in modes],
            ]
        for part, tensor in zip(self.parts, others, strict=True):
            for names in (number, twin):
                operands += [tensor, [names[mode] for mode in part]]
        size = self.network.size(system)
        result = [names[mode] for names in (number, twin) for mode in system]
        matrix: Tensor = torch.einsum(*operands, result)
        return matrix.reshape(size, size)


def _gram(modes: str, part: Tensor, bonds: str, sides: Mapping[str, Side | None]) -> Tensor:
    """Return the Gram matrix of a part over its bonds, with each open mode weighted by its side."""
    scaled = whiten(part, [sides.get(mode) for mode in modes])
    axes = [modes.index(bond) for bond in bonds]
    rows = scaled.movedim(axes, list(range(len(axes))))
    rows = rows.reshape(math.prod(rows.shape[: len(axes)]), -1)
    return rows @ rows.T


def _full(side: Side) -> Tensor:
    return torch.diag(side.values) if side.is_diagonal else side.values


def inverse(matrix: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric positive semi-definite matrix.

    A diagonal may be given as a vector, and is returned as one.

    Example:
        >>> inverse(torch.tensor([4.0, 0.0])).tolist()
        [0.25, 0.0]
    """
    if matrix.dim() == 1:
        floor = float(matrix.max()) * NEGLIGIBLE
        return torch.where(matrix > floor, 1.0 / matrix.clamp_min(floor or 1.0), 0.0)
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * inverse(values)) @ vectors.T
    return found


def _along(modes: str, matrices: Sequence[tuple[str, Tensor]]) -> Solve:
    """Return a function that multiplies a tensor by symmetric matrices along some of its modes."""

    def apply(tensor: Tensor) -> Tensor:
        for group, matrix in matrices:
            rest = [axis for axis, mode in enumerate(modes) if mode not in group]
            order = rest + [modes.index(mode) for mode in group]
            moved = tensor.permute(order)
            rows = moved.reshape(-1, len(matrix))
            product = rows * matrix if matrix.dim() == 1 else rows @ matrix
            back = sorted(range(len(order)), key=order.__getitem__)
            tensor = product.reshape(moved.shape).permute(back)
        return tensor

    return apply
