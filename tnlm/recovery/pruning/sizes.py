"""How many heads and channels every block keeps, and the config of the pruned model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tnlm.errors import BudgetError, ModelError, OptionError
from tnlm.recovery.pruning.groups import CHANNELS, HEADS, Groups, head_width

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
"""Names of the number of channels in configs."""


def settle(
    model: PreTrainedModel,
    groups: Mapping[str, Sequence[Groups]],
    names: Sequence[str],
    keep: float,
) -> dict[str, int]:
    """Return how many groups of each kind every block keeps, for at most ``keep`` parameters.

    There are few heads, and not every number of them makes a valid config: the valid number nearest
    to ``keep`` is used, and channels make up for the difference.

    Args:
        model: not changed.
        groups: the groups of every block, by kind.
        names: the linear modules to which ``keep`` refers.
        keep: fraction of their parameters to keep.

    Raises:
        BudgetError: if no number of groups meets ``keep``.
        OptionError: if heads are given, but no smaller number of them is valid.
    """
    total = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    excess = total - math.floor(keep * total)
    kept: dict[str, int] = {}
    if HEADS in groups:
        valid = _valid_heads(model, groups[HEADS][0])
        count, each = groups[HEADS][0].count, _each(model, groups[HEADS])
        if CHANNELS not in groups:
            enough = [n for n in valid if each * (count - n) >= excess]
            return {HEADS: max(enough)} if enough else _refuse(keep, excess - each * (count - 1))
        kept[HEADS] = min(valid, key=lambda n: (abs(n - keep * count), -n))
        excess -= each * (count - kept[HEADS])
    count, each = groups[CHANNELS][0].count, _each(model, groups[CHANNELS])
    kept[CHANNELS] = count - max(0, -(-excess // each))
    return kept if kept[CHANNELS] >= 1 else _refuse(keep, excess - each * (count - 1))


def _each(model: nn.Module, groups: Sequence[Groups]) -> int:
    """Return how many parameters are removed when every block loses one group."""
    return sum(block.params(model) for block in groups)


def _refuse(keep: float, excess: int) -> NoReturn:
    raise BudgetError(
        f"keep={keep}: with one group left in every block, the linear layers of the blocks still "
        f"have {excess} parameters too many; prune both heads and channels, or keep more"
    )


def _valid_heads(model: PreTrainedModel, heads: Groups) -> list[int]:
    """Return the numbers of groups of heads that the config accepts, including the current one."""
    valid = [heads.count]
    for number in range(1, heads.count):
        try:
            resized(model.config, changes(model, {HEADS: heads}, {HEADS: number}))
        except (StrictDataclassError, ValueError):  # e.g. heads must divide Llama's hidden size
            continue
        valid.append(number)
    if len(valid) == 1:
        raise OptionError(
            f"heads=True, but the config {type(model.config).__name__} accepts no fewer than "
            f"{heads.count} groups of heads; use heads=False"
        )
    return valid


def changes(
    model: PreTrainedModel, groups: Mapping[str, Groups], kept: Mapping[str, int]
) -> dict[str, int]:
    """Return the config's new values.

    Args:
        model: not changed.
        groups: the groups of one block, by kind.
        kept: how many groups of each kind to keep.

    Raises:
        ModelError: if the config does not state the number of channels.
    """
    config, found = model.config, {}
    if HEADS in kept:
        width, shared = head_width(model), groups[HEADS].consumer.slabs.size
        found["num_attention_heads"] = kept[HEADS] * shared // width
        found["head_dim"] = width
        if getattr(config, "num_key_value_heads", None) is not None:
            found["num_key_value_heads"] = kept[HEADS]
    if CHANNELS in kept:
        name = next((name for name in WIDTHS if hasattr(config, name)), None)
        if name is None:
            raise ModelError(
                f"{type(config).__name__} has none of {', '.join(WIDTHS)}; use channels=False"
            )
        found[name] = kept[CHANNELS]
    return found


def resized(config: PreTrainedConfig, values: Mapping[str, int]) -> PreTrainedConfig:
    """Return a copy of a config with new values, validated like one read from a file.

    Example:
        >>> from transformers import LlamaConfig
        >>> resized(LlamaConfig(), {"intermediate_size": 100}).intermediate_size
        100
    """
    made: Any = copy.deepcopy(config)
    for name, value in values.items():
        setattr(made, name, value)
    made.validate()
    return made  # type: ignore[no-any-return]
