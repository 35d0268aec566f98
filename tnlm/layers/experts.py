"""`FactorizedExperts`: a module's experts, each of whose matrices is a stack of networks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.arranged import Arranged, filled
from tnlm.layers.expert_layout import ExpertLayout
from tnlm.layers.grouped import EVERYONE, Everyone, Groups
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.unfolded import activated, normed
from tnlm.tensors.contraction import Step
from tnlm.tensors.gauge import ORDER
from tnlm.tensors.network import Network

CHILD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""Names of the stacks; they differ from those in checkpoints, which transformers converts."""


class StackedLinear(Arranged):
    """One matrix of every expert, dense or with fewer channels.

    Example:
        >>> stack = StackedLinear(3, (4, 2), bias=False).store([nn.Linear(2, 4)] * 3)
        >>> stack(torch.ones(5, 2), Groups.of(torch.tensor([0, 0, 1, 1, 2]), 3)).shape
        torch.Size([5, 4])
    """

    def __init__(self, experts: int, shape: tuple[int, int], *, bias: bool, **made: Any) -> None:
        """Make an uninitialised stack of ``(out, in)`` matrices on a device, in a dtype."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, *shape, **made))
        self.bias = nn.Parameter(torch.empty(experts, shape[0], **made)) if bias else None

    @torch.no_grad()
    def store(self, layers: Sequence[Any]) -> StackedLinear:
        """Copy in the layers of all experts."""
        for number, layer in enumerate(layers):
            self.weight[number].copy_(layer.weight)
            if self.bias is not None:
                self.bias[number].copy_(layer.bias)
        self.arrange()
        return self

    def layer(self, number: int) -> nn.Module:
        """Return a copy of one expert's layer."""
        bias = None if self.bias is None else self.bias[number].detach()
        return filled(self.weight[number].detach(), bias)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Multiply each row of ``(rows, in)`` by its expert's matrix."""
        output = groups.product(x.unsqueeze(1), self.weight.unsqueeze(1)).squeeze(1)
        return output if self.bias is None else output + self.bias[groups.ids]


class StackedFactors(Arranged):
    """One matrix of every expert as networks of the same structure, with factors in stacks.

    It is executed like a `tnlm.layers.linear.FactorizedLinear`: each step of the chain is one
    product of all rows with their experts' matrices. A factor that all experts share is a stack of
    one.

    Args:
        experts: number of experts.
        network: the network of one matrix.
        bias: whether there are biases.
        order: order in which the factors are applied.
        shared: factors that are the same for all experts.
        **made: device and dtype of the (uninitialised) tensors.
    """

    def __init__(
        self,
        experts: int,
        network: Network,
        *,
        bias: bool,
        order: Sequence[str] | None = None,
        shared: Collection[str] = (),
        **made: Any,
    ) -> None:
        """Make the stacks; see the class for the arguments."""
        super().__init__()
        one = FactorizedLinear(network, bias=bias, order=order, device="meta")
        self.network, self.chain, self.order = network, one.chain, order
        self.experts, self.shared = experts, frozenset(shared)
        self.gauged = network.gauge.factor if network.gauge else None
        self.bond = network.sizes[network.gauge.bond] if network.gauge else 0
        self.passes_in, self.passes_out = one._passes_in, one._passes_out
        for name, tensor in one.state_dict().items():
            factor = name.removesuffix(".weight").removesuffix(ORDER)
            shape = (1 if factor in self.shared else experts, *tensor.shape)
            if name.endswith(ORDER):
                orders = torch.zeros(shape, dtype=torch.int64, device=made.get("device"))
                self.register_buffer(name, orders)
            else:
                stack = nn.Parameter(torch.empty(shape, **made))
                setattr(self, name.removesuffix(".weight"), stack)
        if not bias:
            self.bias = None

    @torch.no_grad()
    def store(self, layers: Sequence[nn.Module]) -> StackedFactors:
        """Copy in the layers of all experts."""
        for number, layer in enumerate(layers):
            for name, tensor in layer.state_dict().items():
                self._of(number, name).copy_(tensor)
        self.arrange()
        return self

    def _of(self, number: int, name: str) -> Tensor:
        """Return an expert's tensor, by its name in a layer."""
        stack: Tensor = getattr(self, name.removesuffix(".weight"))
        return stack[min(number, len(stack) - 1)]

    def layer(self, number: int) -> nn.Module:
        """Return a copy of one expert's layer."""
        like = next(self.parameters())
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        biased = self.bias is not None
        layer = FactorizedLinear(self.network, bias=biased, order=self.order, **made)
        with torch.no_grad():
            for name, tensor in layer.state_dict().items():
                tensor.copy_(self._of(number, name))
        return layer

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply its expert's network to each row of ``(rows, in)``."""
        rows = len(x)
        h = x.reshape(rows, *(self.network.sizes[mode] for mode in self.network.inp))
        for step in self.chain.steps:
            if step.permute is not None:
                h = h.permute(0, *(1 + axis for axis in step.permute))
            h = h.reshape(-1, step.blocks, step.width)
            one = EVERYONE if step.factor in self.shared else groups
            h = self._multiply(step, h, one.times(len(h) // rows if rows else 1))
            h = h.reshape(rows, *step.after)
        if self.chain.permute is not None:
            h = h.permute(0, *(1 + axis for axis in self.chain.permute))
        h = h.reshape(rows, self.network.shape[0])
        bias: Tensor | None = self.bias
        return h if bias is None else h + bias[groups.ids].to(h.dtype)

    def _multiply(self, step: Step, h: Tensor, groups: Groups | Everyone) -> Tensor:
        """Multiply each of ``(rows, blocks, width)`` by its expert's factor."""
        stack: Tensor = getattr(self, step.factor)
        if step.factor != self.gauged:
            return groups.product(h, stack.reshape(len(stack), step.blocks, -1, step.width))
        orders: Tensor = getattr(self, step.factor + ORDER)
        if self.passes_in:
            ordered = groups.reorder(h, orders)
            passed, rest = ordered[..., : self.bond], ordered[..., self.bond :]
            return groups.product(rest, stack.unsqueeze(1)) + passed
        if self.passes_out:
            whole = torch.cat([h, groups.product(h, stack.unsqueeze(1))], dim=-1)
            return groups.reorder(whole, orders)
        return groups.product(h, self._assembled(step, stack, orders))

    def _assembled(self, step: Step, stack: Tensor, orders: Tensor) -> Tensor:
        """Return every expert's gauge-fixed factor with its identity, laid out for its step."""
        bond = self.network.gauge.bond if self.network.gauge else ""
        eye = torch.eye(self.bond, dtype=stack.dtype, device=stack.device)
        rows = torch.cat([eye.expand(len(stack), -1, -1), stack], dim=1)
        rows = rows.gather(1, orders.unsqueeze(-1).expand(-1, -1, self.bond))
        others = self.network.factors[step.factor].replace(bond, "")
        full = rows.reshape(len(stack), *(self.network.sizes[mode] for mode in others), self.bond)
        layout = [1 + (others + bond).index(mode) for mode in step.rows + step.contracted]
        return full.permute(0, *layout).reshape(len(stack), step.blocks, -1, step.width)

    def extra_repr(self) -> str:
        """Show the shape and the equation."""
        rows, columns = self.network.shape
        shared = f", shared={sorted(self.shared)}" if self.shared else ""
        return f"{self.experts} x ({rows}, {columns}), equation={self.network.equation!r}{shared}"


Stack = StackedLinear | StackedFactors


class FactorizedExperts(nn.Module):
    """Experts whose matrices are stacks; rows are sorted by expert and multiplied in groups.

    Args:
        layout: the layout of the experts in the original module.
        owner: the original module without its parameters; its code computes the input of
            ``down_proj``.
        stacks: the matrices, by name.
    """

    def __init__(
        self, layout: ExpertLayout, owner: nn.Module | None, stacks: Mapping[str, Stack]
    ) -> None:
        """Store the stacks; see the class for the arguments."""
        super().__init__()
        self.layout = layout
        self.__dict__["owner"] = owner  # not a child: transformers would initialise it
        for name, child in owner.named_children() if owner is not None else ():
            self.add_module(name, child)
        for name, stack in stacks.items():
            self.add_module(CHILD[name], stack)

    def stack(self, projection: str) -> Stack:
        """Return the stack of one matrix of all experts."""
        found: Stack = getattr(self, CHILD[projection])
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the outputs of the experts to which each token is routed, ``(tokens, hidden)``."""
        count = top_k_index.shape[-1]
        ids, order = top_k_index.reshape(-1).sort(stable=True)
        groups = Groups.of(ids, self.layout.experts)
        x = hidden_states[order // count]
        own: Any = self
        gate = own.gate(x, groups) if self.layout.gated else None
        inner = activated(own.owner, self.layout, gate, own.up(x, groups))
        output = normed(own.owner, own.down(inner, groups))
        weights = top_k_weights.reshape(-1)[order].masked_fill(ids >= self.layout.experts, 0)
        weighted = output * weights.unsqueeze(-1)
        total = torch.empty_like(weighted).index_copy(0, order, weighted)
        return total.reshape(-1, count, x.shape[-1]).sum(1).to(hidden_states.dtype)
