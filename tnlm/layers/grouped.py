"""Grouped products: multiplies rows, sorted by expert, by their experts' matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Ends = Tensor | list[int]


@dataclass(frozen=True)
class Groups:
    """The groups of rows that are sorted by expert.

    Attributes:
        ids: ``(rows,)``, the expert of each row; rows without an expert come last.
        ends: the end of every expert's rows; plain integers unless they are traced.
        experts: number of experts.
    """

    ids: Tensor
    ends: Ends
    experts: int

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Groups:
        """Group sorted rows.

        Example:
            >>> Groups.of(torch.tensor([0, 0, 2, 3]), 3).ends
            [2, 2, 3]
        """
        numbers = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        ends: Ends = torch.searchsorted(ids, numbers, right=True)
        if not torch.compiler.is_compiling() and isinstance(ends, Tensor):
            ends = ends.tolist()
        return cls(ids.clamp(max=experts - 1), ends, experts)

    def times(self, count: int) -> Groups:
        """Return the groups if every row is repeated ``count`` times."""
        if count == 1:
            return self
        ends = self.ends
        many = ends * count if isinstance(ends, Tensor) else [end * count for end in ends]
        return replace(self, ids=self.ids.repeat_interleave(count), ends=many)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply every row by its expert's matrices; rows without an expert give 0.

        Args:
            x: ``(rows, blocks, in)``.
            weights: ``(experts, blocks, out, in)``.

        Returns:
            ``(rows, blocks, out)``.

        Example:
            >>> groups = Groups.of(torch.tensor([0, 1, 1]), 2)
            >>> twice = torch.stack([torch.eye(2), 2 * torch.eye(2)])[:, None]
            >>> groups.product(torch.ones(3, 1, 2), twice)[:, 0].tolist()
            [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        """
        if not isinstance(self.ends, Tensor) and not torch.is_grad_enabled():
            return _product(x, weights, self.ends)
        ends = self.ends
        ends = ends if isinstance(ends, Tensor) else torch.tensor(ends)
        found: Tensor = torch.ops.tnlm.grouped_product(x, weights, ends)
        return found

    def reorder(self, x: Tensor, orders: Tensor) -> Tensor:
        """Reorder the last axis of ``(rows, 1, n)`` by each row's expert in ``(experts, n)``.

        Example:
            >>> groups = Groups.of(torch.tensor([0, 1]), 2)
            >>> x = torch.tensor([[[1, 2]], [[3, 4]]])
            >>> groups.reorder(x, torch.tensor([[0, 1], [1, 0]]))[:, 0].tolist()
            [[1, 2], [4, 3]]
        """
        if isinstance(self.ends, Tensor):  # avoids an index per row when compiled
            return x.gather(-1, orders[self.ids].unsqueeze(1))
        starts = [0, *self.ends]
        sizes = [end - start for start, end in pairwise(starts)]
        *parts, rest = x.split([*sizes, len(x) - starts[-1]])
        found = [_ordered(part, orders[e]) for e, part in enumerate(parts) if len(part)]
        return torch.cat([*found, rest]) if len(rest) or not found else torch.cat(found)


class Everyone:
    """Stands for groups where all rows meet the same matrix, a stack of one.

    Example:
        >>> EVERYONE.product(torch.ones(3, 1, 2), 2 * torch.eye(2)[None, None])[:, 0].tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    def times(self, count: int) -> Everyone:
        """Return the same."""
        return self

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply every row; see `Groups.product`."""
        return _multiply(x, weights[0])

    def reorder(self, x: Tensor, orders: Tensor) -> Tensor:
        """Put the last axis into one order; see `Groups.reorder`."""
        return x.gather(-1, orders[0].expand(x.shape))


EVERYONE = Everyone()


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    if len(x) == 1:
        return x.index_select(-1, order)
    return x.gather(-1, order.expand(x.shape))


def _product(x: Tensor, weights: Tensor, ends: list[int]) -> Tensor:
    rows, blocks, _ = x.shape
    parts, start = [], 0
    for number, end in enumerate(ends):
        if end > start:
            parts.append(_multiply(x[start:end], weights[number]))
            start = end
    if start < rows or not parts:
        parts.append(x.new_zeros(rows - start, blocks, weights.shape[2]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``(rows, blocks, in)`` by ``(blocks, out, in)``."""
    if x.shape[1] == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def _forward(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return _product(x, weights, ends.tolist()).contiguous()


def _like(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weights.shape[2])


def _backward(x: Tensor, weights: Tensor, ends: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the matrices from that of the products."""
    of_rows, of_weights = torch.zeros_like(x), torch.zeros_like(weights)
    start = 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            given = output[start:end].transpose(0, 1)
            of_rows[start:end] = torch.bmm(given, weights[number]).transpose(0, 1)
            torch.bmm(given.transpose(1, 2), x[start:end].transpose(0, 1), out=of_weights[number])
            start = end
    return of_rows, of_weights


def _backward_like(
    x: Tensor, weights: Tensor, ends: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _derive(ctx: Any, output: Tensor) -> tuple[Tensor, Tensor, None]:
    of_rows, of_weights = torch.ops.tnlm.grouped_product_backward(*ctx.saved_tensors, output)
    return of_rows, of_weights, None


# A loop over groups of unknown sizes cannot be traced, but a custom operator is opaque to tracing.
torch.library.custom_op(
    "tnlm::grouped_product",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor ends) -> Tensor",
)
torch.library.register_fake("tnlm::grouped_product", _like)
torch.library.custom_op(
    "tnlm::grouped_product_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor ends, Tensor output) -> (Tensor, Tensor)",
)
torch.library.register_fake("tnlm::grouped_product_backward", _backward_like)
torch.library.register_autograd("tnlm::grouped_product", _derive, setup_context=_keep)
