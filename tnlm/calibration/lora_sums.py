"""Sums of the importance of a matrix's entries, from the gradients of a LoRA beside it.

The gradients of a LoRA are two projections of the weight's. With G the gradient of the weight W and
s the LoRA's scaling, ``grad_B = s G A.T`` and ``grad_A = s B.T G``, so that

    grad_B A + B grad_A = s (G A.T A + B B.T G),

which is ``s G`` if B = 0 and A is square and orthogonal. Row and column sums of its square follow
from matrices of the LoRA's size.

Source: Moskovskiy, Pletenev, Zagoruyko and Panchenko, "Memory Efficient LM Compression using
Fisher Information from Low-Rank Representations", NLDB 2025; the estimate of the gradient as in
LoRAPrune (Zhang et al. 2024, arXiv 2305.18403).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tnlm.errors import CalibrationError, OptionError, did_you_mean
from tnlm.layers.adapters import Adapter

KINDS = ("fisher", "taylor")
"""Squared gradients, or squared gradients times weights."""

BLOCK = 2**18
"""Number of entries of a matrix that are computed at once."""

Parts = Sequence[slice | Tensor]
"""The rows of each matrix in a module."""
WHOLE: Parts = (slice(None),)
"""The rows in a module with a single matrix."""

Importance = dict[str, dict[str, Tensor]]
"""Row sums ``outputs`` and column sums ``inputs``, by module name."""


def lora_gradient(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, step: float = 0.0
) -> Tensor:
    """Return the gradient of the matrix that a LoRA adapts, ``g_B A + B g_A - step g_B g_A``.

    With ``step=1``, it is the change of the product in one step of gradient descent,
    ``B A - (B - g_B)(A - g_A)``; with 0, its first-order part.

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        grad_A: gradient of A.
        grad_B: gradient of B.
        step: weight of the quadratic term.

    Example:
        >>> one = torch.ones(1, 1)
        >>> lora_gradient(2 * one, 3 * one, one, one).item()
        5.0
        >>> lora_gradient(2 * one, 3 * one, one, one, step=1.0).item()  # 3 * 2 - (3 - 1) * (2 - 1)
        4.0
    """
    return grad_B @ (A - step * grad_A) + B @ grad_A


def importance_sums(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    weight: Tensor | None,
    *,
    scaling: float = 1.0,
    step: float = 0.0,
    kind: str = "fisher",
) -> tuple[Tensor, Tensor]:
    """Return row sums ``(out,)`` and column sums ``(in,)`` of an importance, float64.

    With g the `lora_gradient`, the importance is ``g**2`` (``"fisher"``), whose sums need two Gram
    matrices of size 2r; or ``(g * (W + scaling B A))**2`` (``"taylor"``), computed in blocks of
    rows. No ``(out, in)`` matrix is formed.

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        grad_A: gradient of A.
        grad_B: gradient of B.
        weight: W, ``(out, in)``; may be None for ``"fisher"``.
        scaling: factor of the LoRA's product.
        step: weight of the gradient's quadratic term.
        kind: ``"fisher"`` or ``"taylor"``.

    Raises:
        OptionError: if the kind is unknown, or ``"taylor"`` has no weight.

    Example:
        >>> A, B = torch.eye(2), torch.zeros(1, 2)
        >>> rows, columns = importance_sums(A, B, A, torch.tensor([[3.0, 4.0]]), None)
        >>> rows.tolist(), columns.tolist()
        ([25.0], [9.0, 16.0])
    """
    check_kind(kind)
    A, B, grad_A, grad_B = (t.detach().double() for t in (A, B, grad_A, grad_B))
    left, right = torch.cat([grad_B, B], 1), torch.cat([A - step * grad_A, grad_A])
    if kind == "fisher":  # of g = left @ right
        rows = ((left @ (right @ right.T)) * left).sum(1)
        columns = (right * ((left.T @ left) @ right)).sum(0)
        return rows.clamp_min(0.0), columns.clamp_min(0.0)
    if weight is None:
        raise OptionError("kind='taylor' needs the weight")
    rows, columns = A.new_empty(len(B)), A.new_zeros(A.shape[1])
    for at in torch.arange(len(B), device=A.device).split(max(1, BLOCK // A.shape[1])):
        merged = weight[at].detach().double() + scaling * (B[at] @ A)
        squares = (left[at] @ right).mul_(merged).square_()
        rows[at] = squares.sum(1)
        columns += squares.sum(0)
    return rows, columns


class Sums:
    """Sums of importance over examples, by module."""

    def __init__(self, kind: str, step: float, decay: float | None, parts: Mapping[str, Parts]):
        self._kind, self._step, self._decay, self._parts = kind, step, decay, parts
        self._examples = 0
        self._sums: Importance = {}

    def add(self, adapters: Mapping[str, Adapter], where: str) -> None:
        """Add one example's importance; modules that it did not reach count as zero."""
        self._examples += 1
        if self._decay is not None:
            for sums in self._sums.values():
                for total in sums.values():
                    total.mul_(self._decay)
        share = 1.0 if self._decay is None else 1.0 - self._decay
        for name, adapter in adapters.items():
            grad_A, grad_B = adapter.A.grad, adapter.B.grad
            if grad_A is None or grad_B is None:
                continue
            seen = bool(grad_A.any() or grad_B.any())  # an expert may be called without tokens
            if not seen and name not in self._sums:
                continue
            rows, columns = self._of(name, adapter, grad_A, grad_B)
            if not bool(rows.isfinite().all() and columns.isfinite().all()):
                raise CalibrationError(f"a gradient at {name} is not finite, on {where}")
            if name not in self._sums:
                zeros = {"outputs": torch.zeros_like(rows), "inputs": torch.zeros_like(columns)}
                self._sums[name] = zeros
            self._sums[name]["outputs"].add_(rows, alpha=share)
            self._sums[name]["inputs"].add_(columns, alpha=share)

    def _of(
        self, name: str, adapter: Adapter, grad_A: Tensor, grad_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight = weight_of(adapter.base) if self._kind == "taylor" else None
        sums = torch.zeros(len(adapter.B), dtype=torch.float64, device=adapter.B.device)
        found = []
        for rows in self._parts.get(name, WHOLE):
            held = None if weight is None else weight[rows]
            sums[rows], columns = importance_sums(
                adapter.A,
                adapter.B[rows],
                grad_A,
                grad_B[rows],
                held,
                scaling=adapter.scaling,
                step=self._step,
                kind=self._kind,
            )
            found.append(columns)
        return sums, torch.stack(found) if len(found) > 1 else found[0]

    def means(self, adapters: Mapping[str, Adapter]) -> Importance:
        """Return means over examples, rescaled from the LoRA's gradients to the weight's."""
        if not self._examples:
            raise CalibrationError("the batches have labels, but none of them is predicted")
        if not self._sums:
            raise CalibrationError(
                f"the loss reaches none of the modules, such as {next(iter(adapters))}; choose "
                "other targets, or give data that they see"
            )
        decay = self._decay
        weight = self._examples if decay is None else 1.0 - decay**self._examples
        return {
            name: {k: (v / (weight * adapters[name].scaling ** 2)).cpu() for k, v in sums.items()}
            for name, sums in self._sums.items()
        }


def heights_of(parts: Parts, rows: int) -> list[int]:
    """Return the number of rows of each matrix in a module.

    Example:
        >>> heights_of([slice(0, 2), torch.tensor([2, 4, 3])], 5)
        [2, 3]
    """
    return [len(torch.arange(rows)[part]) for part in parts]


def weight_of(module: Any) -> Tensor:
    """Return the ``(out, in)`` weight of a layer, dequantized if necessary."""
    weight: Tensor = module.weight.detach()
    if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(module).detach()
    return weight.T if isinstance(module, Conv1D) else weight


def check_kind(kind: str) -> None:
    """Raise `OptionError` for an unknown kind of importance."""
    if kind not in KINDS:
        raise OptionError(f"kind={kind!r}{did_you_mean(str(kind), KINDS)}")
