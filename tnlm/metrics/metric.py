"""Norms of the error E = W - W' of an approximation, weighted by rows, columns or entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnlm.errors import CalibrationError
from tnlm.metrics.sides import Side, modes_of
from tnlm.tensors.eigen import leading_eigenpairs, leading_eigenvectors, leading_left
from tnlm.tensors.linalg import energies

ACCURATE = 1e-10
"""Squared singular values below this fraction of the largest are lost in a Gram matrix."""


class Metric:
    """A two-sided norm, ``||G^(1/2) E C^(1/2)||_F``; without sides, the Frobenius norm.

    Here ``S^(1/2)`` is any R with ``R R.T = S``, and G's stands transposed.

    Every metric except the element-wise one has this form: G weights the outputs (rows) and C the
    inputs (columns). Each is a full matrix, a diagonal, or absent.

    Args:
        outputs: G, the weighting of the rows.
        inputs: C, the weighting of the columns.
        mean: the mean input ``(in,)``; the error ``E @ mean`` then goes into a bias and does not
            count, so C should be centered.

    Source: K-FAC (Martens and Grosse 2015) for the pair, SVD-LLM (arXiv 2403.07378) for C alone.

    Example:
        >>> Metric().norm(torch.tensor([[3.0, 4.0]]))
        5.0
        >>> Metric(outputs=Side(torch.tensor([4.0]))).norm(torch.tensor([[3.0, 4.0]]))
        10.0
    """

    separable = True

    def __init__(
        self,
        outputs: Side | None = None,
        inputs: Side | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Store the sides; see the class for the arguments."""
        self.outputs = outputs
        self.inputs = inputs
        self.mean = mean
        self._latest: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed again."""
        return {**self.__dict__, "_latest": None}

    def pull(self, error: Tensor) -> Tensor:
        """Return ``G E C``, half the gradient of the squared norm, float64."""
        error = error.detach().double()
        if self.inputs is not None:
            error = self.inputs.apply(error)
        return error if self.outputs is None else self.outputs.apply(error.T).T

    def norm(self, error: Tensor, *, keep: bool = True) -> float:
        """Return the norm of an ``(out, in)`` error.

        Args:
            error: the matrix.
            keep: whether to keep what a fit of the same matrix can use.
        """
        if self.separable and self.outputs is None and self.inputs is None:
            return float(error.detach().double().norm())
        if self.separable and self.outputs is not None and self.inputs is not None:
            outer = self.inputs if error.shape[0] > error.shape[1] else self.outputs
            core = self._core(error) if keep else self._product(error)
            return math.sqrt(max(outer.inner(core), 0.0))
        error = error.detach().double()
        return math.sqrt(max(float((self.pull(error) * error).sum()), 0.0))

    def relative(self, weight: Tensor, approximation: Tensor) -> float:
        """Return the norm of the error over the norm of ``weight``; 0 for a zero weight."""
        size = self.norm(weight)
        difference = weight.detach().double() - approximation.detach().double()
        return self.norm(difference, keep=False) / size if size > 0 else 0.0

    def whiten(self, weight: Tensor) -> Tensor:
        """Return M = ``G^(1/2) W C^(1/2)``, float64, whose Frobenius norm is the norm of W."""
        whitened = self.scale_outputs(weight)
        return whitened if self.inputs is None else self.inputs.scale(whitened)

    def scale_outputs(self, weight: Tensor) -> Tensor:
        """Return ``G^(1/2) W``."""
        weight = weight.detach().double()
        return weight if self.outputs is None else self.outputs.scale(weight.T).T

    def gram(self, weight: Tensor) -> Tensor:
        """Return ``M @ M.T``, or of a tall matrix ``M.T @ M``, from a root of the smaller side."""
        core = self._core(weight)
        side = self.outputs if weight.shape[0] <= weight.shape[1] else self.inputs
        return core if side is None else side.scale(side.scale(core).T)

    def _core(self, weight: Tensor) -> Tensor:
        """Return ``W C W.T``, or of a tall matrix ``W.T G W``; that of the last one is kept.

        It is kept with a copy of W, since values may change without a trace (``W.data``, numpy).
        """
        if self._latest is not None and _same(self._latest[0], weight):
            return self._latest[1]
        self._latest = None  # free the last one before the next is made
        core = self._product(weight)
        self._latest = weight.detach().clone(), core
        return core

    def _product(self, weight: Tensor) -> Tensor:
        """Return ``W C W.T``, or of a tall matrix ``W.T G W``."""
        wide = weight.detach().double()
        is_tall = wide.shape[0] > wide.shape[1]
        rows, side = (wide.T, self.outputs) if is_tall else (wide, self.inputs)
        return (rows if side is None else side.apply(rows)) @ rows.T

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return the squared singular values of M, largest first."""
        return energies(self.gram(weight))

    def leading_outputs(self, weight: Tensor, rank: int) -> Tensor:
        """Return an orthonormal basis ``(out, rank)`` of the leading left singular vectors of M."""
        if weight.shape[0] <= weight.shape[1]:
            return leading_eigenvectors(self.gram(weight), rank)
        whitened = self.whiten(weight)
        inputs = leading_eigenvectors(whitened.T @ whitened, rank)
        basis: Tensor = torch.linalg.qr(whitened @ inputs)[0]
        return basis

    def low_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors ``(out, rank)`` and ``(rank, in)`` of the best low-rank product.

        With U the leading left singular vectors of M, the product is ``G^(-1/2) U U.T G^(1/2) W``.
        It needs no inverse of C, so C may be singular, and full rank is exact.
        """
        if self.outputs is not None and weight.shape[0] > weight.shape[1]:
            tall = self._tall_low_rank(weight, rank)
            if tall is not None:
                return tall
        if self.outputs is None and self.inputs is None:
            return _plain_low_rank(weight.detach().double(), rank)
        basis = self.leading_outputs(weight, rank)
        right = basis.T @ self.scale_outputs(weight)
        left = basis if self.outputs is None else self.outputs.unscale(basis.T).T
        return left, right

    def _tall_low_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
        """Return the same product without a root of G, or None if it would be inaccurate.

        With V the right singular vectors of M and s its singular values, U = M V / s. Hence
        ``G^(-1/2) U = W C^(1/2) V / s`` and ``U.T G^(1/2) W = (C^(1/2) V / s).T W.T G W``.
        """
        values, vectors = leading_eigenpairs(self.gram(weight), rank)
        if not float(values[-1]) > ACCURATE * float(values[0]):
            return None
        mixing = vectors if self.inputs is None else self.inputs.back(vectors.T).T
        mixing = mixing / values.sqrt()
        return weight.detach().double() @ mixing, mixing.T @ self._core(weight)

    def start(self) -> Metric:
        """Return the nearest separable metric, from which a fit starts; here, this metric."""
        return self

    def modes(self, out_split: Sequence[int], in_split: Sequence[int]) -> list[Side | None]:
        """Return the side of every mode, outputs first, of the nearest separable metric.

        Example:
            >>> metric = Metric(inputs=Side(torch.tensor([1.0, 1.0, 3.0, 3.0])))
            >>> nothing, outer, inner = metric.modes((5,), (2, 2))
            >>> nothing, outer.values.round(decimals=6).tolist()
            (None, [1.0, 3.0])
        """
        near = self.start()
        return modes_of(near.outputs, out_split) + modes_of(near.inputs, in_split)


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same values, as the same numbers in the same place."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a, b)


def _plain_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors with the least Frobenius error, from the smaller Gram matrix."""
    if weight.shape[0] <= weight.shape[1]:
        return leading_left(weight, rank)
    basis, rest = leading_left(weight.T, rank)
    return rest.T, basis.T


class InputMoment(Metric):
    """The output error on data, ``E[||E x||^2] = tr(E C E.T)`` with C = E[x x.T].

    Args:
        moment: C, ``(in, in)``, symmetric; converted to float64.
        damping: see :class:`tnlm.metrics.sides.Side`.

    Raises:
        CalibrationError: if C is not finite.

    Source: whitening as in SVD-LLM (arXiv 2403.07378) and DRONE. The root is a Cholesky factor, or
    from an eigendecomposition where C is singular.

    Example:
        >>> metric = InputMoment(torch.diag(torch.tensor([4.0, 1.0])), damping=0.0)
        >>> metric.norm(torch.tensor([[3.0, 8.0]]))
        10.0
    """

    def __init__(self, moment: Tensor, damping: float = 1e-6) -> None:
        """Damp the moment; see the class for the arguments."""
        super().__init__(inputs=Side(moment, damping))


class Elementwise(Metric):
    """Weights every entry of the error separately, ``sum of H * E**2``.

    Fits under it have no closed form; they start from the nearest separable weights.

    Args:
        weights: H, ``(out, in)``, not negative, e.g. a Fisher information; scaled to mean 1.
        floor: smallest weight, relative to the mean, so that no entry is free.

    Raises:
        CalibrationError: if H has entries that are not finite, or negative.

    Source: TFWSVD, Hua et al. 2022, arXiv 2211.09718.

    Example:
        >>> metric = Elementwise(torch.tensor([[1.0, 3.0]]) / 2, floor=0.0)
        >>> round(metric.norm(torch.tensor([[2.0, 2.0]])) ** 2, 6)
        8.0
    """

    separable = False

    def __init__(self, weights: Tensor, floor: float = 1e-6) -> None:
        """Scale the weights; see the class for the arguments."""
        super().__init__()
        weights = weights.detach().double()
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()):
            raise CalibrationError("element-wise weights must be finite and not negative")
        mean = float(weights.mean())
        scaled = weights / mean if mean > 0 else torch.ones_like(weights)
        self.weights = scaled.clamp_min(floor)

    def pull(self, error: Tensor) -> Tensor:
        """Return ``H * E``, half the gradient of the squared norm."""
        return self.weights * error.detach().double()

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``H^(1/2) * W``, entry by entry."""
        return self.weights.sqrt() * weight.detach().double()

    def start(self) -> Metric:
        """Return the nearest weights of the form row times column: FWSVD on both sides."""
        return Metric(Side(self.weights.mean(1)), Side(self.weights.mean(0)))
