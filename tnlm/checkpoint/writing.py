"""Makes transformers write compressed models: run-time names, the description, the guard.

All ways to write a model (`save_pretrained`, `push_to_hub`, a Trainer's checkpoints) end in two
methods of transformers. They are wrapped here, since no hook covers all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from tnlm.checkpoint.configs import GUARD, clear_guard, is_ours

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERSIONS = "_weight_conversions"
"""Attribute in which transformers keeps the conversions between files and model."""

_NOTHING = object()


def install() -> None:
    """Wrap the two methods that write every file of a model."""
    from transformers import PreTrainedConfig, PreTrainedModel

    wrapt.wrap_function_wrapper(PreTrainedModel, "save_pretrained", _save_pretrained)
    wrapt.wrap_function_wrapper(PreTrainedConfig, "to_diff_dict", _to_diff_dict)


def _save_pretrained(save: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    with _described(model):
        return save(*args, **kwargs)


def _to_diff_dict(make: Callable[..., Any], config: Any, args: Any, kwargs: Any) -> Any:
    """Point transformers at a file that does not exist; only the plug-in reverses this."""
    written = make(*args, **kwargs)
    if is_ours(written.get("quantization_config")):
        # A text-only model reads only the text config.
        inner = (written.get(name) for name in type(config).sub_configs)
        for part in (written, *inner):
            if isinstance(part, dict):
                part["transformers_weights"] = GUARD
    return written


def save_description(model: PreTrainedModel, directory: Path) -> None:
    """Write the config of a model as ``save_pretrained`` does, without the weights."""
    with _described(model):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)


@contextmanager
def _described(model: PreTrainedModel) -> Iterator[None]:
    """Make the config describe its model while both are written.

    A dense model may have been built from the config of a compressed one, and a tower's own config
    has no description. Conversions to other names and layouts are meant for dense weights, but
    their patterns would also match names of factors.
    """
    from tnlm.checkpoint.transformers_plugin import description

    said, config = description(model), vars(model.config)
    if said is not None:
        tied = {**(model._tied_weights_keys or {}), **said.tied}
        with (
            _set(config, "quantization_config", said),
            _set(vars(model), "_tied_weights_keys", tied),
            _set(vars(model), CONVERSIONS, []),
        ):
            yield
    elif is_ours(config.get("quantization_config")):
        clear_guard(model.config)
        with _set(config, "quantization_config", _NOTHING):
            yield
    else:
        yield


@contextmanager
def _set(space: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Set or remove an attribute temporarily."""
    old = space.get(name, _NOTHING)
    _put(space, name, value)
    try:
        yield
    finally:
        _put(space, name, old)


def _put(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _NOTHING:
        space.pop(name, None)
    else:
        space[name] = value
