"""Finds the stacks of blocks in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

Blocks = list[tuple[str, nn.Module]]
"""The blocks of a stack, in order, with their names."""


def find_stacks(model: nn.Module, modules: Sequence[str]) -> list[Blocks]:
    """Return the blocks of every list with watched modules; of nested lists, the outer one's."""
    stacks = {
        name: stack
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and any(m.startswith(name + ".") for m in modules)
    }
    outer = [n for n in stacks if not any(n.startswith(other + ".") for other in stacks)]
    found = [[(f"{n}.{index}", block) for index, block in enumerate(stacks[n])] for n in outer]
    watched = {model.get_submodule(name) for name in modules}
    held = [[m for _, block in blocks for m in set(block.modules()) & watched] for blocks in found]
    count = Counter(module for inside in held for module in inside)
    alone = [all(count[module] == 1 for module in inside) for inside in held]
    return [blocks for blocks, unshared in zip(found, alone, strict=True) if unshared]


def find_blocks(model: nn.Module, modules: Sequence[str]) -> Blocks:
    """Return the blocks of the list with watched modules; empty unless there is exactly one."""
    stacks = find_stacks(model, modules)
    return stacks[0] if len(stacks) == 1 else []


def state_of(output: Any) -> Any:
    """Return the hidden state from a block's output, which is the first of several values.

    Example:
        >>> state_of(("state", "attention")), state_of(["state"]), state_of("state")
        ('state', 'state', 'state')
    """
    return output[0] if isinstance(output, tuple | list) else output


def split(modules: Sequence[str], blocks: Blocks) -> tuple[list[str], list[str]]:
    """Return the modules inside blocks, and those outside."""
    inside = [n for n in modules if any(n.startswith(name + ".") for name, _ in blocks)]
    return inside, [n for n in modules if n not in inside]
