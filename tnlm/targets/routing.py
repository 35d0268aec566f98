"""Finds routed experts and their router, and tests whether removing experts equals masking them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.rows import row_tensors, with_rows
from tnlm.targets.stubs import copied

TOKENS = 32
"""Number of random tokens on which a block is tried."""
LOW = -1e4
"""The router's logit of a masked expert, below all others."""
CLOSE = 64
"""Outputs may differ by this many units in the last place of the largest."""


@dataclass(frozen=True)
class Mixture:
    """A block of routed experts.

    Attributes:
        block: dotted name of the module that holds the router and the experts.
        router: name of the router in the block.
        experts: name of the experts in the block.
        count: number of experts.
        active: number of experts per token.
    """

    block: str
    router: str
    experts: str
    count: int
    active: int

    @property
    def path(self) -> str:
        """Dotted name of the module that holds the experts."""
        return f"{self.block}.{self.experts}" if self.block else self.experts


class Recorder(nn.Module):
    """A stub of experts that records the arguments of its calls.

    Attributes:
        calls: the arguments of every call: states ``(tokens, width)``, and indices and weights of
            the experts, both ``(tokens, active)``.
    """

    def __init__(self) -> None:
        """Start without calls."""
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Record a call, and return zeros."""
        if index.is_floating_point() or index.shape != weights.shape or index.dim() != 2:
            raise TypeError("experts are not called with the tokens' expert indices and weights")
        self.calls.append((states, index, weights))
        return torch.zeros_like(states)


def stacks_of_experts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names of modules with routed experts as 3-D parameters, and the expert counts.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> tiny = MixtralConfig(vocab_size=8, hidden_size=4, intermediate_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=1,
        ...                      num_key_value_heads=1, num_local_experts=4)
        >>> list(stacks_of_experts(MixtralForCausalLM(tiny)))
        [('model.layers.0.mlp.experts', 4)]
    """
    for name, module in model.named_modules():
        tensors = list(module.parameters(recurse=False))
        counts = {len(tensor) for tensor in tensors if tensor.dim()}
        if counts == {getattr(module, "num_experts", None)} and any(t.dim() == 3 for t in tensors):
            yield name, counts.pop()


def find_mixture(model: nn.Module, experts: str, count: int) -> Mixture | str:
    """Return the mixture to which experts belong, or why experts cannot be dropped.

    The router is a sibling of the experts with one row per expert. A trial checks that the block
    with some rows removed from router and experts gives the same as with these experts' logits
    masked; weights, hooks and the random state do not change.

    Args:
        model: the model with the block.
        experts: dotted name of the module that holds the experts.
        count: number of experts.
    """
    parent, _, own = experts.rpartition(".")
    block = model.get_submodule(parent)
    why = "there is no router with one row per expert beside them"
    for name, child in block.named_children():
        if name == own or not row_tensors(child, count):
            continue
        found = _tried(block, name, own, count)
        if isinstance(found, int):
            return Mixture(parent, name, own, count, found)
        why = found
    return why


def fewer(module: nn.Module, count: int, kept: Tensor) -> nn.Module:
    """Return a router, or an experts module, with only the kept of ``count`` experts."""
    return with_rows(module, row_tensors(module, count), count, kept)


@torch.no_grad()
def _tried(block: nn.Module, router: str, experts: str, count: int) -> int | str:
    """Return the number of experts per token, or why no expert can be dropped."""
    gate, inner = block.get_submodule(router), block.get_submodule(experts)
    rows = next(t for t in gate.parameters() if t.dim() and len(t) == count)
    if rows.is_meta or rows.dim() != 2:
        return "its router has no weights to try"
    states = _states(rows)
    devices = [rows.device] if rows.is_cuda else []
    with torch.random.fork_rng(devices):
        try:
            recorder = Recorder()
            copied(block, {inner: recorder})(states)
            [(_, index, _)] = recorder.calls
            active = index.shape[1]
            if active >= count:
                return "every token uses all experts"
            for size in {max(active, count // 2), count - 1}:
                if not _agrees(block, gate, inner, _some(count, size), states):
                    return "its router chooses differently among fewer experts"
        except Exception as error:  # the model's code may raise anything
            return f"it cannot be tried with fewer experts ({type(error).__name__}: {error})"
    return active


def _states(like: Tensor) -> Tensor:
    """Return random states with a large first value, through which a row can mask its expert."""
    drawn = torch.randn(1, TOKENS, like.shape[1], generator=torch.Generator().manual_seed(0))
    drawn[..., 0] = 4.0
    return drawn.to(like)


def _some(count: int, size: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size].sort().values


def _agrees(
    block: nn.Module, gate: nn.Module, inner: nn.Module, kept: Tensor, states: Tensor
) -> bool:
    count = _count(inner)
    masked = copied(block, {gate: _masked(gate, count, kept)})
    small = copied(block, {gate: fewer(gate, count, kept), inner: fewer(inner, count, kept)})
    expected, found = _first(masked(states)), _first(small(states))
    close = CLOSE * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return bool((expected.double() - found.double()).abs().max() <= close)


def _count(experts: nn.Module) -> int:
    return len(next(experts.parameters()))


def _masked(gate: nn.Module, count: int, kept: Tensor) -> nn.Module:
    """Return a copy of a router that chooses only kept experts."""
    made = copy.deepcopy(fewer(gate, count, torch.arange(count)))
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.dim() and len(tensor) == count:
            rows = torch.zeros_like(tensor[:1])
            rows[0].view(-1)[0] = LOW
            tensor[gone.to(tensor.device)] = rows
    return made


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    return first
