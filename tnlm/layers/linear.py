"""`FactorizedLinear`: executes any network in place of an `nn.Linear`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnlm.layers.applied import applied_weight, apply_linear
from tnlm.layers.arranged import arrange_made, linear
from tnlm.layers.machine import machine
from tnlm.layers.pricing import crossing
from tnlm.layers.rebuilt import RebuiltWeights
from tnlm.tensors.contraction import Step, chain, pairwise, passes_in, passes_out, stored_shapes
from tnlm.tensors.gauge import ORDER, expand, with_identity
from tnlm.tensors.network import Factors, Network


class FactorizedLinear(nn.Module):
    """A linear layer whose weight is a tensor network.

    Every factor is a named ``nn.Linear`` child, laid out for its step of the chain, so that PEFT,
    quantizers and exporters see ordinary linear layers. A factor with one matrix per block of the
    activation stores them stacked, and is applied by one batched product. The identity block of a
    gauge-fixed factor costs no multiply-adds if it acts only on the bond: its inputs are copied to
    its rows, or the inputs at its columns are added to the result. Otherwise the factor is small,
    and is assembled from its free rows at each call.

    If it takes less time on this machine, the weight is rebuilt and multiplied at once. In
    training, if activations between the factors would take more memory than a dense layer's, they
    are recomputed in the backward pass instead of being saved.

    Args:
        network: the tensor network of the ``(out, in)`` weight.
        bias: whether to add a bias.
        order: order in which the factors are applied; by default, the one with the fewest MACs.
        device: device of the (uninitialised) tensors.
        dtype: their dtype.

    Attributes:
        crossing: token count from which the weight is rebuilt; if None, set at the first call.
        rebuilt: cache of rebuilt weights, if set by `tnlm.keep_rebuilt`.

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
        # Two or three plain products without more multiply-adds are faster at any length.
        plain = self.flat and self.macs <= self.out_features * self.in_features
        self.crossing: float | None = math.inf if plain else None
        self._plain = plain
        self.rebuilt: RebuiltWeights | None = None
        self._hoards = _saved_numbers(self.chain.steps) > sum(network.shape)
        self._gauged = network.gauge.factor if network.gauge else None
        self._bond = network.sizes[network.gauge.bond] if network.gauge else 0
        self._split = [self._bond, network.gauge_rows - self._bond]
        self._passes_out = any(
            passes_out(network, s.factor, s.batch, s.contracted) for s in self.chain.steps
        )
        self._passes_in = any(
            passes_in(network, s.factor, s.batch, s.kept) for s in self.chain.steps
        )
        shapes = stored_shapes(network, self.chain.steps)
        for step in self.chain.steps:
            rows, columns = shapes[step.factor]
            child = linear(rows, columns, arranged=step.is_flat, device=device, dtype=dtype)
            setattr(self, step.factor, child)
        if network.gauge is not None:
            order_of_rows = torch.zeros(network.gauge_rows, dtype=torch.int64, device=device)
            self.register_buffer(network.gauge.factor + ORDER, order_of_rows)
        empty = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @torch.no_grad()
    def store(self, factors: Factors, bias: Tensor | None = None) -> FactorizedLinear:
        """Copy in the factors (as :func:`tnlm.tensors.gauge.fix` returns them) and bias."""
        gauge = self.network.gauge
        for step in self.chain.steps:
            tensor = factors[step.factor]
            if gauge is None or gauge.factor != step.factor:
                modes = self.network.factors[step.factor]
                tensor = tensor.permute([modes.index(mode) for mode in step.rows + step.contracted])
            elif self._passes_in:
                tensor = tensor.T
            weight = getattr(self, step.factor).weight
            weight.copy_(tensor.reshape(weight.shape))
        if gauge is not None:
            order = factors[gauge.factor + ORDER]
            # Inputs are reordered before the product, outputs after it.
            order = order.argsort() if self._passes_in else order
            getattr(self, gauge.factor + ORDER).copy_(order)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        arrange_made(self)
        return self

    def factors(self) -> Factors:
        """Return all full factors, one axis per mode, with identity blocks filled in."""
        stored: Factors = {}
        gauge = self.network.gauge
        for step in self.chain.steps:
            weight = applied_weight(getattr(self, step.factor))
            if gauge is not None and gauge.factor == step.factor:
                stored[step.factor] = weight.T if self._passes_in else weight
                continue
            layout = step.rows + step.contracted
            sizes = [self.network.sizes[mode] for mode in layout]
            modes = self.network.factors[step.factor]
            stored[step.factor] = weight.reshape(sizes).permute([layout.index(m) for m in modes])
        if gauge is not None:
            order = getattr(self, gauge.factor + ORDER)
            stored[gauge.factor + ORDER] = order.argsort() if self._passes_in else order
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
        if self.crossing != math.inf and self._rebuild_pays(x):
            return F.linear(x, self._rebuilt_weight(), self.bias)
        if not self.flat:
            h = self._pass_on_in_modes(x)
            return h if self.bias is None else h + self.bias.to(h.dtype)
        *steps, last = self.chain.steps
        for step in steps:
            x = self._multiply(step, x)
        return self._multiply(last, x, self.bias)

    def _rebuild_pays(self, x: Tensor) -> bool:
        # A graph keeps one path for every length.
        if _makes_graph():
            return False
        if self.crossing is None:
            self.crossing = self._price(x)
        return x.numel() >= self.crossing * self.in_features

    def _price(self, x: Tensor) -> float:
        if x.device.type not in ("cpu", "cuda"):
            return math.inf
        prices = machine(x.dtype, x.device.type)
        kept = self.rebuilt is not None
        return crossing(self.network, self.chain, prices, x.element_size(), kept=kept)

    def keep_rebuilt(self, kept: RebuiltWeights | None) -> None:
        """Set the cache of rebuilt weights, and update ``crossing`` at the next call."""
        self.rebuilt = kept
        if not self._plain:
            self.crossing = None

    def _rebuilt_weight(self) -> Tensor:
        if self.rebuilt is None or torch.is_grad_enabled():
            return self.to_dense()
        return self.rebuilt.weight(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not self._plain:
            self.crossing = None  # it depends on dtype and device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _pass_on_in_modes(self, x: Tensor) -> Tensor:
        """Run the chain on the modes; in training, possibly without saving activations."""
        if self._hoards and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again: Tensor = checkpoint(self._reshape_and_pass_on, x, use_reentrant=False)
            return again
        return self._reshape_and_pass_on(x)

    def _reshape_and_pass_on(self, x: Tensor) -> Tensor:
        """Run the chain, with the modes that each step contracts moved to the end."""
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

    def _multiply(self, step: Step, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by a factor, and add the bias, if any."""
        # Reads the registries directly: nn.Module's attribute lookup costs as much as a small
        # product, and decoding makes hundreds of them per token.
        child: Any = self._modules[step.factor]
        if step.factor != self._gauged:
            return apply_linear(child, h, bias)
        order: Any = self._buffers[step.factor + ORDER]
        if self._passes_in:
            passed, rest = _reorder(h, order).split_with_sizes(self._split, dim=-1)
            h = apply_linear(child, rest)
            # The dtypes differ under autocast.
            h = h + (passed if passed.dtype is h.dtype else passed.to(h.dtype))
        elif self._passes_out:
            h = _reorder(torch.cat((h, apply_linear(child, h)), dim=-1), order)
        else:
            h = F.linear(h, self._assembled(step))
        return h if bias is None else h + bias.to(h.dtype)

    def _multiply_blocks(self, step: Step, h: Tensor) -> Tensor:
        """Multiply every block of ``(tokens, blocks, width)`` by its own matrix."""
        gauged = step.factor == self._gauged
        rows = self._assembled(step) if gauged else applied_weight(getattr(self, step.factor))
        blocks = rows.reshape(step.blocks, -1, step.width)
        return torch.bmm(h.transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)

    def _assembled(self, step: Step) -> Tensor:
        """Return the gauge-fixed factor with its identity, laid out for its step."""
        bond = self.network.gauge.bond if self.network.gauge else ""
        rows = with_identity(
            applied_weight(getattr(self, step.factor)), getattr(self, step.factor + ORDER)
        )
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


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Return ``(..., n)`` with its last axis in the given order."""
    if _is_row(x, order):
        return x.index_select(-1, order)
    # With many rows, index_select along the last axis is several times slower on the CPU.
    return x.gather(-1, order.expand(x.shape))


def _is_row(x: Tensor, order: Tensor) -> bool:
    """Return whether a tensor has one row; unknown in a graph, which is for any number."""
    return not _makes_graph() and x.numel() == order.numel()


def _makes_graph() -> bool:
    """Return whether the layer is being compiled, exported or traced."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or tracing


def _saved_numbers(steps: Sequence[Step]) -> int:
    """Return how many activations per token the backward pass of the steps needs."""
    return sum(math.prod(step.rest) * step.blocks * step.width for step in steps)
