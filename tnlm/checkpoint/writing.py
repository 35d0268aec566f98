"""What transformers writes of a compressed model: run-time names, its description, the guard.

Whatever writes a model (`save_pretrained`, `push_to_hub`, a Trainer's checkpoints) ends in two
methods of transformers, which are wrapped here: it has no hook that all of them go through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import wrapt

from tnlm.checkpoint.configs import GUARD, clear_guard, is_ours

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERSIONS = "_weight_conversions"
"""Where transformers keeps how names and layouts on disk differ from those of the model."""

_NOTHING = object()


def install() -> None:
    """Wrap the two methods through which every file of a model goes."""
    from transformers import PreTrainedConfig, PreTrainedModel

    wrapt.wrap_function_wrapper(PreTrainedModel, "save_pretrained", _save_pretrained)
    wrapt.wrap_function_wrapper(PreTrainedConfig, "to_diff_dict", _to_diff_dict)


def _save_pretrained(save: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    with _described(model):
        return save(*args, **kwargs)


def _to_diff_dict(make: Callable[..., Any], config: Any, args: Any, kwargs: Any) -> Any:
    """Point transformers at a file that does not exist; only the plug-in takes this back."""
    written = make(*args, **kwargs)
    if is_ours(written.get("quantization_config")):
        # A model of the text alone reads the config of the text alone.
        inner = (written.get(name) for name in type(config).sub_configs)
        for part in (written, *inner):
            if isinstance(part, dict):
                part["transformers_weights"] = GUARD
    return written


@contextmanager
def _described(model: PreTrainedModel) -> Iterator[None]:
    """Let the config say what its model holds while both are written.

    A dense model may have been made from the config of a compressed one, and a tower has a config
    that never said anything. Conversions to other names and layouts are for dense weights: their
    patterns match names of factors, too.
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
    """Set an attribute, or take it away, for a while."""
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
