"""A model without its weights: modules and buffers from the config, and where the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tnlm.checkpoint.configs import is_ours
from tnlm.checkpoint.dense_models import DTYPES, class_of
from tnlm.checkpoint.folder import weight_files
from tnlm.checkpoint.raw import Place, places, read
from tnlm.errors import CheckpointError, ModelError, OptionError, did_you_mean


def open_skeleton(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> tuple[PreTrainedModel, dict[nn.Parameter, Place]]:
    """Return the model of a directory without its weights, and where each of these is.

    Every parameter has its shape and dtype, and NaN as its only value, which takes no memory;
    buffers have their values. The model is in eval mode, as ``from_pretrained`` returns it.

    Args:
        folder: with a config and safetensors files.
        dtype: dtype of the weights; ``"auto"`` keeps the checkpoint's.
        device: of the weights, once they are read, and of the buffers.

    Raises:
        CheckpointError: if a file or tensor is missing, truncated or of another shape.
        ModelError: if the model must be loaded as a whole.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}{did_you_mean(dtype, DTYPES)}", argument="dtype")
    files, listed = weight_files(folder)
    stored = places(files, listed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        what = "compressed" if is_ours(config.quantization_config) else "quantized"
        raise ModelError(f"{folder} is {what} already; give a dense model")
    chosen = _dtype(dtype, config, stored)
    kind: Any = class_of(str(folder)) or AutoModelForCausalLM
    make = getattr(kind, "from_config", None) or kind._from_config
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = make(config, dtype=chosen)
    model.eval()
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _put_placeholders(model, device)
    model.tie_weights()
    _check_dtypes(model, chosen)
    return model, _found(model, _renamed(model, stored))


@torch.inference_mode(False)  # the weight may enter graphs later
def placeholder(like: Tensor, device: torch.device | None = None) -> Tensor:
    """Return NaNs of a tensor's shape and dtype that take no memory, on its device or another.

    Example:
        >>> placeholder(torch.ones(2, 2))
        tensor([[nan, nan],
                [nan, nan]])
    """
    place = like.device if device is None else device
    if not like.is_floating_point():
        return torch.zeros((), dtype=like.dtype, device=place).expand(like.shape)
    return torch.full((), torch.nan, dtype=like.dtype, device=place).expand(like.shape)


def _dtype(asked: str | torch.dtype, config: Any, stored: dict[str, Place]) -> torch.dtype:
    """Return the dtype that ``from_pretrained`` would choose."""
    if isinstance(asked, torch.dtype):
        return asked
    named = config.dtype if asked == "auto" else asked
    if named is None:
        return next(place.dtype for place in stored.values() if place.dtype.is_floating_point)
    return named if isinstance(named, torch.dtype) else getattr(torch, str(named))


def _put_placeholders(model: nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device, and move buffers."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                empty = placeholder(old, device)
                module._parameters[name] = nn.Parameter(empty, old.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _check_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise `ModelError` if transformers would load some weights in another dtype."""
    kept = model._get_dtype_plan(dtype)
    names = (name for name, _ in model.named_parameters())
    found = next((name for name in names if set(name.split(".")) & set(kept)), None)
    if found is not None:
        raise ModelError(
            f"{type(model).__name__} keeps {found} in float32; pass dtype='float32', or compress "
            "the model in memory",
            argument="dtype",
        )


def _renamed(model: PreTrainedModel, stored: dict[str, Place]) -> dict[str, Place]:
    """Return where each tensor is, by its name in the model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Place] = {}
    for key, place in stored.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if pattern is not None and name in expected:
            raise ModelError(
                f"{name} is put together from several tensors of the files, such as {key}; "
                "compress this model in memory, without memory="
            )
        if name in expected and tuple(expected[name].shape) != place.shape:
            raise CheckpointError(
                f"{place.file} holds {key} of shape {place.shape}, but the config asks for "
                f"{tuple(expected[name].shape)}: it is a file of another model"
            )
        found[name] = place
    return found


def _found(model: PreTrainedModel, stored: dict[str, Place]) -> dict[nn.Parameter, Place]:
    """Return where every parameter is; fill buffers, which are small."""
    by_parameter: dict[nn.Parameter, Place] = {}
    missing: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = stored.get(name)
        if place is None:
            missing.setdefault(parameter, name)
        elif parameter in by_parameter:
            _check_tied(name, by_parameter[parameter], place)
        else:
            by_parameter[parameter] = place
    for parameter, name in missing.items():
        if parameter not in by_parameter:
            raise CheckpointError(
                f"{len(missing)} tensors of {type(model).__name__} are not in the checkpoint, e.g. "
                f"{name}; give a whole checkpoint of that class"
            )
    for name, buffer in _buffers(model):
        if name in stored:
            buffer.copy_(read(stored[name]))
    return by_parameter


def _check_tied(name: str, first: Place, second: Place) -> None:
    if not torch.equal(read(first), read(second)):
        raise CheckpointError(
            f"{name} is tied to another tensor by the config, but the files hold two different "
            "ones; set tie_word_embeddings to false in config.json"
        )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that checkpoints hold."""
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
