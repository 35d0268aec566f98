"""Disables the key-value cache, which single passes do not need, and restores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from torch import nn


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs of a model and of its submodels, each once.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> configs_of(tiny)[0] is tiny.config
        True
    """
    waiting = [getattr(module, "config", None) for module in model.modules()][::-1]
    found: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += list(
                vars(config).values()
            )  # such as the text config of a vision-language model
    return list(found.values())


@contextmanager
def caches_kept(model: nn.Module, use: bool | None = None) -> Iterator[None]:
    """Restore ``use_cache`` of every config after a block of code.

    Args:
        model: the model with the configs.
        use: the value within the block; None for no change.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> with caches_kept(tiny, use=False):
        ...     tiny.config.use_cache
        False
        >>> tiny.config.use_cache
        True
    """
    before = [(config, getattr(config, "use_cache", None)) for config in configs_of(model)]
    before = [(config, value) for config, value in before if value is not None]
    try:
        for config, _ in before if use is not None else ():
            config.use_cache = use
        yield
    finally:
        for config, value in before:
            config.use_cache = value
