"""Selects modules by words, names, patterns or classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import TargetError
from tnlm.targets.alike import aliases
from tnlm.targets.base import Matrix, Member, Selector
from tnlm.targets.blocks import in_blocks
from tnlm.targets.ends import input_table, output_head
from tnlm.utils.names import block_of

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
EMBEDDINGS, TOKEN_EMBEDDINGS = "embeddings", "token-embeddings"
ODD_BLOCKS = "odd-blocks"
WORDS = (ALL_LINEAR, EMBEDDINGS, TOKEN_EMBEDDINGS, ODD_BLOCKS, EXPERTS)


@dataclass(frozen=True)
class Ends:
    """A model's embeddings, its output head, and the modules in its blocks."""

    table: nn.Module | None
    head: nn.Module | None
    blocks: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Ends:
        """Examine a model."""
        return cls(input_table(model), output_head(model), in_blocks(model), aliases(model))

    def names(self, name: str) -> tuple[str, ...]:
        """Return all names of a module; an expert's module also has those of all experts."""
        return name, *self.aliases.get(name, ())

    def is_around(self, name: str, module: nn.Module) -> bool:
        """Return whether a linear weight is outside the blocks, and not the output head."""
        linear = _is_linear(module) and module is not self.head
        return linear and bool(self.blocks) and name not in self.blocks


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Matrix) and not isinstance(module, nn.Embedding)


def matches(name: str, module: nn.Module, wanted: Selector, ends: Ends) -> bool:
    """Return whether a selector selects a module."""
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    if isinstance(wanted, str):
        if wanted == ALL_LINEAR:
            linear = _is_linear(module) and module is not ends.head
            return linear and not ends.is_around(name, module)
        if wanted == EMBEDDINGS:
            return isinstance(module, nn.Embedding)
        if wanted == TOKEN_EMBEDDINGS:
            return isinstance(module, nn.Embedding) and module is ends.table
        if wanted == ODD_BLOCKS:
            linear = not isinstance(module, nn.Embedding)
            return linear and (block_of(name) or 0) % 2 == 1
        return any(_fits(wanted, each) for each in ends.names(name))
    return any(
        isinstance(module, word)
        if isinstance(word, type)
        else (word in WORDS and matches(name, module, word, ends))
        or any(each == word or each.endswith("." + word) for each in ends.names(name))
        for word in wanted
    )


def names_target(wanted: Selector, target: Member) -> bool:
    """Return whether a selector selects a block's experts, by word, name or pattern."""
    words = [wanted] if isinstance(wanted, str | type) else wanted
    if isinstance(wanted, str) and wanted not in WORDS:
        return _fits(wanted, target.module)
    names = [word for word in words if isinstance(word, str)]
    return EXPERTS in names or any(
        target.module == name or target.module.endswith(f".{name}") for name in names
    )


def names_part(part: str, wanted: Selector) -> bool:
    """Return whether a part of a fused module is selected by its own name."""
    if isinstance(wanted, type):
        return False
    if isinstance(wanted, str):
        return wanted not in WORDS and _fits(wanted, part)
    return any(
        isinstance(word, str) and (part == word or part.endswith("." + word)) for word in wanted
    )


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(
            f"{pattern!r} is not a regular expression: {error}; to name modules, use a list"
        ) from error


def check_selectors(**given: Any) -> None:
    """Raise `TargetError` unless each selector is a word, a class, or a collection of these.

    Example:
        >>> check_selectors(targets=["q_proj"], ignore="lm_head")
    """
    for argument, value in given.items():
        words = [value] if isinstance(value, str | type) else value
        plain = isinstance(words, Collection) and not isinstance(words, bytes | Mapping | Tensor)
        if not plain or not all(isinstance(word, str | type) for word in words):
            raise TargetError(
                f"{argument}={value!r}; allowed: a word such as 'all-linear', a regular "
                "expression, a module class, or a list of names, words and classes"
            )
