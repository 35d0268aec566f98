"""The parts in which a model is read, fitted and written: its blocks, and all around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from tnlm.calibration.blocks import find_stacks
from tnlm.errors import ModelError
from tnlm.layers.expert_layout import ExpertLayout, layout_of
from tnlm.targets.base import Matrix


def block_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's blocks, in order.

    Raises:
        ModelError: if it has none, or holds experts in 3-D parameters.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> block_names(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1)))
        ['h.0', 'h.1']
    """
    experts = [n for n, m in model.named_modules() if isinstance(layout_of(m), ExpertLayout)]
    if experts:
        raise ModelError(
            f"{experts[0]} holds its experts in 3-D parameters, which are not compressed block by "
            "block yet; compress this model in memory, without memory= and scratch=",
            argument=("memory", "scratch"),
        )
    linear = [n for n, m in model.named_modules() if isinstance(m, Matrix)]
    found = [name for stack in find_stacks(model, linear) for name, _ in stack]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks, so it cannot be compressed block by "
            "block; compress it in memory, without memory= and scratch=",
            argument=("memory", "scratch"),
        )
    return found


def tensors_of(model: nn.Module, block: str | None, blocks: Sequence[str]) -> list[str]:
    """Return the names of the tensors that a checkpoint holds of a block, or of none.

    Args:
        model: holds the tensors.
        block: name of the block; None for what is outside of all.
        blocks: names of all blocks.
    """
    inside = tuple(f"{name}." for name in blocks) if block is None else f"{block}."
    return [name for name in _saved(model) if name.startswith(inside) is (block is not None)]


def _saved(model: nn.Module) -> Iterator[str]:
    """Yield the names of a model's parameters and buffers, of tied ones the first."""
    tied = {*getattr(model, "all_tied_weights_keys", {})}
    yield from (name for name in model.state_dict() if name not in tied)
