"""The text of a search over levels, cut into windows for its stages and windows apart from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tnlm.errors import EvaluationError
from tnlm.recovery.examples import training_set
from tnlm.studies.level_search.selection import Selection


@dataclass(frozen=True)
class Windows:
    """Token ids ``(length,)`` each.

    Attributes:
        search: for the stages; the first of them hold the tokens that a stage measures.
        apart: for the scales of units.
    """

    search: Sequence[Tensor]
    apart: Sequence[Tensor] = ()


def windows_of(
    text: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    selection: Selection,
    apart: int,
) -> Windows:
    """Cut a text into windows.

    Args:
        text: in any form that training takes.
        tokenizer: needed for text.
        length: tokens per window.
        selection: its stages measure the first windows.
        apart: tokens measured on further windows; 0 for none.

    Raises:
        EvaluationError: if the text is too short.

    Example:
        >>> import torch
        >>> found = windows_of(torch.arange(64), None, 8, Selection(2, (1,), (16,)), 8)
        >>> len(found.search), len(found.apart)
        (2, 6)
    """
    made = training_set(text, tokenizer, max_length=length, label=None)
    windows: list[Tensor] = [item["input_ids"] for item in made.items]
    tokens = max(selection.tokens)
    if sum(map(len, windows)) < tokens:
        raise EvaluationError(
            f"search= has {sum(map(len, windows)):,} tokens, but a stage measures {tokens:,}; give "
            "more text, or a smaller selection=",
            argument=("search", "selection"),
        )
    if not apart:
        return Windows(windows)
    count = next(n for n in range(len(windows) + 1) if sum(map(len, windows[:n])) >= tokens)
    rest = sum(map(len, windows[count:]))
    if rest < apart:
        raise EvaluationError(
            f"search= has {rest:,} tokens after those that a stage measures, but "
            f"scale_tokens={apart:,}; give more text, or a smaller scale_tokens= or selection=",
            argument=("search", "scale_tokens", "selection"),
        )
    return Windows(windows[:count], windows[count:])
