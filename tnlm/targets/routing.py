"""Routed experts with the router before them, and whether fewer experts act as masked ones do."""

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
"""Tokens of random values on which a block is tried."""
LOW = -1e4
"""A router's logit that no other is below: of an expert that is masked."""
CLOSE = 64
"""Outputs are the same that differ by this many units in the last place of the largest."""


@dataclass(frozen=True)
class Mixture:
    """A block of routed experts.

    Attributes:
        block: dotted name of the module that holds the router and the experts.
        router: the router's name in it.
        experts: the experts' name in it.
        count: how many experts there are.
        active: how many of them a token meets.
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
    """Stands for experts, and notes what they are called with.

    Attributes:
        calls: states ``(tokens, width)``, and the indices and weights of their experts, both
            ``(tokens, active)``, at every call.
    """

    def __init__(self) -> None:
        """Start with no call."""
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Note a call, and return zeros."""
        if index.is_floating_point() or index.shape != weights.shape or index.dim() != 2:
            raise TypeError("experts are not called with indices and weights of their tokens")
        self.calls.append((states, index, weights))
        return torch.zeros_like(states)


def stacks_of_experts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the names of modules that hold routed experts as 3-D parameters, and their numbers.

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
    """Return the mixture that experts belong to, or why they cannot be dropped.

    The router is a module beside the experts with as many rows. It is tried whether a block whose
    router and experts lose some rows gives what it gives with these experts' logits masked;
    weights, hooks and the random state stay as they are.

    Args:
        model: holds the block.
        experts: dotted name of the module that holds the experts.
        count: how many there are.
    """
    parent, _, own = experts.rpartition(".")
    block = model.get_submodule(parent)
    why = "no router with a row for each expert stands beside them"
    for name, child in block.named_children():
        if name == own or not row_tensors(child, count):
            continue
        found = _tried(block, name, own, count)
        if isinstance(found, int):
            return Mixture(parent, name, own, count, found)
        why = found
    return why


def fewer(module: nn.Module, count: int, kept: Tensor) -> nn.Module:
    """Return a router, or experts, with some of ``count`` experts."""
    return with_rows(module, row_tensors(module, count), count, kept)


@torch.no_grad()
def _tried(block: nn.Module, router: str, experts: str, count: int) -> int | str:
    """Return how many experts a token meets, or why none can be dropped."""
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
                return "a token meets all of its experts"
            for size in {max(active, count // 2), count - 1}:
                if not _agrees(block, gate, inner, _some(count, size), states):
                    return "its router chooses otherwise among fewer experts"
        except Exception as error:  # another's code, that may raise anything
            return f"it cannot be tried with fewer experts ({type(error).__name__}: {error})"
    return active


def _states(like: Tensor) -> Tensor:
    """Return random states whose first value is large: it lets a row mask its expert."""
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
    """Return a copy of a router that chooses none but the experts kept."""
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
