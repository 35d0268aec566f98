"""Finds the modules in a model's repeated blocks, as opposed to heads, poolers and the like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def in_blocks(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of all modules in the repeated blocks of a model's body.

    Blocks are elements of a module list that have child modules, unlike a list of single matrices,
    such as several heads. A ``Sequential`` counts if two elements have the same class. The body is
    a task model's base model, or the whole model if the base model has no blocks.

    Args:
        model: any Hugging Face model.

    Returns:
        Names of the modules inside blocks; empty for a model without blocks.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=9, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1))
        >>> found = in_blocks(model)
        >>> "bert.encoder.layer.0.output.dense" in found
        True
        >>> "bert.pooler.dense" in found, "classifier" in found
        (False, False)
    """
    blocks = list(_blocks(model, ""))
    start = f"{model.base_model_prefix}."
    inside = [name for name in blocks if name.startswith(start)]
    starts = tuple(f"{name}." for name in inside or blocks)
    return frozenset(
        name for name, _ in model.named_modules(remove_duplicate=False) if name.startswith(starts)
    )


def _blocks(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of the outermost blocks."""
    kinds: Counter[type] = Counter()
    if isinstance(module, nn.ModuleList | nn.Sequential):
        least = 1 if isinstance(module, nn.ModuleList) else 2
        kinds.update(type(child) for child in module if _is_composite(child))
        kinds = Counter({kind: count for kind, count in kinds.items() if count >= least})
    for part, child in module.named_children():
        inner = f"{name}.{part}" if name else part
        if type(child) in kinds:
            yield inner
        else:
            yield from _blocks(child, inner)


def _is_composite(module: nn.Module) -> bool:
    """Return whether a module has child modules, and is not a list."""
    return not isinstance(module, nn.ModuleList) and any(True for _ in module.children())
