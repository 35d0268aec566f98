"""`FactorizedLinear`: executes any network in place of an `nn.Linear`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlm.decompositions.gauge import ORDER, expand, with_identity
from tnlm.layers.contraction import Step, chain, pairwise, passes_through
from tnlm.network import Factors, Network


class FactorizedLinear(nn.Module):
    """A linear map whose weight is a tensor network.

    Every factor is an ``nn.Linear`` child under its own name, laid out for its step of the chain,
    so that PEFT, quantizers and exporters meet ordinary linears. A factor with a matrix for every
    block of the activation holds them stacked, and is applied by one batched product. A
    gauge-fixed factor whose bond is contracted away passes the identity block through
    (concatenate, reorder); one whose bond stays is small and is put together from its free rows at
    each call.

    Args:
        network: the tensor network of the ``(out, in)`` weight.
        bias: whether a bias is added.
        order: the factors in the order in which they meet the activation; least MACs if not given.
        device: where the (uninitialised) tensors are made.
        dtype: their dtype.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> factors = {"left": torch.randn(6, 2), "right": torch.randn(2, 5)}
        >>> layer = FactorizedLinear(net, bias=False).store(factors)
        >>> x = torch.randn(3, 5)
        >>> bool(torch.allclose(layer(x), x @ layer.to_dense().T, atol=1e-5))
        True
    """

    def __init__(
        self,
        network: Network,
        *,
        bias: bool,
        order: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the children, uninitialised; see the class for the arguments."""
        super().__init__()
        self.network = network
        self.out_features, self.in_features = network.shape
        self.chain = chain(network, order)
        self.macs = self.chain.macs
        self.flat = self.chain.is_flat
        self.crossing = self._crossing()
        self._gauged = network.gauge.factor if network.gauge else None
        self._copies = any(
            passes_through(network, s.factor, s.batch, s.contracted) for s in self.chain.steps
        )
        for step in self.chain.steps:
            rows, columns = self._stored_shape(step)
            child = nn.Linear(1, 1, bias=False, device="meta", dtype=dtype)
            child.in_features, child.out_features = columns, rows
            child.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
            setattr(self, step.factor, child)
        if network.gauge is not None:
            order_of_rows = torch.zeros(network.gauge_rows, dtype=torch.int64, device=device)
            self.register_buffer(network.gauge.factor + ORDER, order_of_rows)
        empty = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    def _crossing(self) -> float:
        """Token count from which rebuilding the weight takes fewer multiply-adds."""
        surplus = self.macs - self.out_features * self.in_features
        return math.inf if surplus <= 0 else math.ceil(pairwise(self.network).macs / surplus)

    def _stored_shape(self, step: Step) -> tuple[int, int]:
        gauge, network = self.network.gauge, self.network
        if gauge is not None and gauge.factor == step.factor:
            return network.gauge_rows - network.sizes[gauge.bond], network.sizes[gauge.bond]
        return network.size(step.rows), network.size(step.contracted)

    @torch.no_grad()
    def store(self, factors: Factors, bias: Tensor | None = None) -> FactorizedLinear:
        """Copy in the factors (as :func:`tnlm.decompositions.gauge.fix` returns them) and bias."""
        gauge = self.network.gauge
        for step in self.chain.steps:
            tensor = factors[step.factor]
            if gauge is None or gauge.factor != step.factor:
                modes = self.network.factors[step.factor]
                tensor = tensor.permute([modes.index(mode) for mode in step.rows + step.contracted])
            weight = getattr(self, step.factor).weight
            weight.copy_(tensor.reshape(weight.shape))
        if gauge is not None:
            getattr(self, gauge.factor + ORDER).copy_(factors[gauge.factor + ORDER])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

    def factors(self) -> Factors:
        """Return every factor in full, one axis per mode, identity blocks filled in."""
        stored: Factors = {}
        gauge = self.network.gauge
        for step in self.chain.steps:
            weight = _weight(getattr(self, step.factor))
            if gauge is not None and gauge.factor == step.factor:
                stored[step.factor] = weight
                continue
            layout = step.rows + step.contracted
            sizes = [self.network.sizes[mode] for mode in layout]
            modes = self.network.factors[step.factor]
            stored[step.factor] = weight.reshape(sizes).permute([layout.index(m) for m in modes])
        if gauge is not None:
            stored[gauge.factor + ORDER] = getattr(self, gauge.factor + ORDER)
        return expand(self.network, stored)

    def to_dense(self) -> Tensor:
        """Return the ``(out, in)`` weight, rebuilt from the factors."""
        factors = self.factors()
        table = pairwise(self.network)([factors[name] for name in self.network.factors])
        return table.reshape(self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` weight; rebuilt at every access."""
        return self.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to ``(..., in)``, giving ``(..., out)``."""
        if self._rebuild_pays(x):
            return F.linear(x, self.to_dense(), self.bias)
        h = self._pass_on(x) if self.flat else self._reshape_and_pass_on(x)
        return h if self.bias is None else h + self.bias

    def _rebuild_pays(self, x: Tensor) -> bool:
        # A compiled or exported graph keeps one path for every length.
        if self.crossing == math.inf or torch.compiler.is_compiling():
            return False
        return x.numel() >= self.crossing * self.in_features

    def _pass_on(self, h: Tensor) -> Tensor:
        """Run the chain when every step is a plain product on the last axis."""
        for step in self.chain.steps:
            h = self._multiply(step, h)
        return h

    def _reshape_and_pass_on(self, x: Tensor) -> Tensor:
        """Run the chain, moving the modes that each step contracts to the end."""
        lead = x.shape[:-1]
        axes = tuple(range(len(lead)))
        h = x.reshape(*lead, *(self.network.sizes[mode] for mode in self.network.inp))
        for step in self.chain.steps:
            if step.permute is not None:
                h = h.permute(*axes, *(len(lead) + axis for axis in step.permute))
            if step.blocks == 1:
                h = self._multiply(step, h.reshape(*lead, *step.rest, step.width))
            else:
                h = self._multiply_blocks(step, h.reshape(-1, step.blocks, step.width))
            h = h.reshape(*lead, *step.after)
        if self.chain.permute is not None:
            h = h.permute(*axes, *(len(lead) + axis for axis in self.chain.permute))
        return h.reshape(*lead, self.out_features)

    def _multiply(self, step: Step, h: Tensor) -> Tensor:
        # The registries are read directly: nn.Module's attribute look-up costs as much as a small
        # product, and decoding makes hundreds of them a token.
        child: Any = self._modules[step.factor]
        if step.factor != self._gauged:
            applied: Tensor = child(h)
            return applied
        order: Any = self._buffers[step.factor + ORDER]
        if self._copies:
            # gather, because index_select on the last axis is several times slower on the CPU.
            rows = torch.cat((h, child(h)), dim=-1)
            return rows.gather(-1, order.expand(rows.shape))
        return F.linear(h, self._assembled(step, with_identity(_weight(child), order)))

    def _multiply_blocks(self, step: Step, h: Tensor) -> Tensor:
        """Multiply every block of ``(tokens, blocks, width)`` by its own matrix."""
        rows = _weight(getattr(self, step.factor))
        if step.factor == self._gauged:
            order = getattr(self, step.factor + ORDER)
            rows = self._assembled(step, with_identity(rows, order))
        blocks = rows.reshape(step.blocks, -1, step.width)
        return torch.bmm(h.transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)

    def _assembled(self, step: Step, rows: Tensor) -> Tensor:
        """Lay the rows of a gauge-fixed factor, identity included, out for its step."""
        bond = self.network.gauge.bond if self.network.gauge else ""
        others = self.network.factors[step.factor].replace(bond, "")
        full = rows.reshape(*(self.network.sizes[mode] for mode in others), rows.shape[-1])
        layout = [(others + bond).index(mode) for mode in step.rows + step.contracted]
        return full.permute(layout).reshape(-1, step.width)

    def extra_repr(self) -> str:
        """Show the shape, the equation and the multiply-adds per token."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, equation={self.network.equation!r}, macs={self.macs}"
        )


def _weight(child: nn.Linear) -> Tensor:
    """Return the weight that a child applies; an adapter may have been wrapped around it."""
    if type(child) is nn.Linear:
        return child.weight
    like = child.weight
    eye = torch.eye(child.in_features, dtype=like.dtype, device=like.device)
    applied: Tensor = child(eye)
    return applied.T
