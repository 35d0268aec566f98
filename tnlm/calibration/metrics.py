"""How the error of an approximation is measured: a symmetric positive form on E = W - W'."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from tnlm.decompositions.linalg import energies
from tnlm.errors import CalibrationError


class Metric:
    """The Frobenius norm, ``||E||_F``: every entry of the error counts the same.

    Example:
        >>> Metric().norm(torch.tensor([[3.0, 4.0]]))
        5.0
    """

    name = "identity"

    def whiten(self, weight: Tensor) -> Tensor:
        """Return M, float64, ``(out, in)``, such that ``||M||_F`` is the norm of ``weight``."""
        return weight.detach().double()

    def output_gram(self, weight: Tensor) -> Tensor:
        """Return ``M @ M.T``, ``(out, out)``, without forming M where that is cheaper."""
        whitened = self.whiten(weight)
        return whitened @ whitened.T

    def norm(self, error: Tensor) -> float:
        """Return the norm of an ``(out, in)`` error."""
        return float(error.detach().double().norm())

    def relative(self, weight: Tensor, approximation: Tensor) -> float:
        """Return the norm of the error over the norm of ``weight``; 0 for a zero weight."""
        size = self.norm(weight)
        error = self.norm(weight.detach().double() - approximation.detach().double())
        return error / size if size > 0 else 0.0

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return the squared singular values of M, largest first."""
        if weight.shape[0] <= weight.shape[1]:
            return energies(self.output_gram(weight))
        whitened = self.whiten(weight)
        return energies(whitened.T @ whitened)

    def leading_outputs(self, weight: Tensor, rank: int) -> Tensor:
        """Return an orthonormal basis ``(out, rank)`` of the leading left singular vectors of M."""
        if weight.shape[0] <= weight.shape[1]:
            outputs: Tensor = torch.linalg.eigh(self.output_gram(weight))[1]
            return outputs.flip(-1)[:, :rank]
        whitened = self.whiten(weight)
        inputs = torch.linalg.eigh(whitened.T @ whitened)[1].flip(-1)[:, :rank]
        basis: Tensor = torch.linalg.qr(whitened @ inputs)[0]
        return basis


class InputMoment(Metric):
    """The output error on data, ``E[||E x||^2] = tr(E C E.T)`` with C = E[x x.T].

    Args:
        moment: C, ``(in, in)``, symmetric; computed with in float64.
        damping: C is replaced by ``C + damping * mean(diag(C)) * I``, so that directions the data
            never showed still count a little and a singular C does no harm.

    Raises:
        CalibrationError: if C is not finite.

    Source: whitening as in SVD-LLM (arXiv 2403.07378) and DRONE; the square root is symmetric, from
    an eigen-decomposition, so that it exists for every C.

    Example:
        >>> metric = InputMoment(torch.diag(torch.tensor([4.0, 1.0])), damping=0.0)
        >>> metric.norm(torch.tensor([[3.0, 8.0]]))
        10.0
    """

    name = "input"

    def __init__(self, moment: Tensor, damping: float = 1e-6) -> None:
        """Damp the moment; see the class for the arguments."""
        moment = moment.detach().to(torch.float64, copy=True)
        if not bool(moment.isfinite().all()):
            raise CalibrationError("the second moment of the inputs is not finite")
        scale = float(moment.diagonal().mean())
        # Inputs that are all zero say nothing: every direction then counts the same.
        moment.diagonal().add_(damping * scale if scale > 0 else 1.0)
        self.moment = moment

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of C."""
        values, vectors = torch.linalg.eigh(self.moment)
        root: Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
        return root

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``weight @ C^(1/2)``."""
        return weight.detach().double() @ self.root

    def output_gram(self, weight: Tensor) -> Tensor:
        """Return ``weight @ C @ weight.T``: the second moment of the outputs."""
        weight = weight.detach().double()
        return weight @ self.moment @ weight.T

    def norm(self, error: Tensor) -> float:
        """Return ``sqrt(tr(E C E.T))``."""
        error = error.detach().double()
        return math.sqrt(max(float(((error @ self.moment) * error).sum()), 0.0))
