"""Inputs of tiny models: ids, pictures or sound, by what a model calls its main input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from family_configs import FIRST_WORD, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

ROWS, LENGTH, SAMPLES, FRAMES = 2, 8, 4000, 32
MODALITIES = {
    "input_ids": "text",
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "flattened_patches": "vision",
    "input_values": "speech",
    "input_features": "speech",
}


def modality(model: PreTrainedModel) -> str:
    """Return what a model reads: text, vision, speech, or several of them."""
    config = model.config.to_dict()
    towers = {"vision_config", "audio_config", "speech_config", "encoder_config"} & config.keys()
    if (towers and "text_config" in config) or "decoder_config" in config:
        return "multimodal"
    return MODALITIES.get(model.main_input_name, "other")


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the first inputs of a model that it takes.

    Raises:
        ValueError: if it takes none of those that are tried.
    """
    said: list[str] = []
    for inputs in _candidates(model):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # code of others: whatever it raises, it takes no such input
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            said.append(f"{shapes}: {type(error).__name__}: {error}")
        else:
            return inputs
    raise ValueError("; ".join(said))


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield a main input alone, then with one of another kind, as models of several take them."""
    main, takes = model.main_input_name, inspect.signature(model.forward).parameters
    decoder = _decoder(model)
    for tensor in _mains(main, model.config):
        yield {main: tensor, **decoder}
    others = [name for name in MODALITIES if name in takes and name != main]
    for tensor in _mains(main, model.config):
        for name in others:
            for other in _mains(name, model.config):
                yield {main: tensor, name: other, **decoder}


def _mains(main: str, config: Any) -> Iterator[Tensor]:
    """Yield tensors that a main input may be."""
    draw = torch.Generator().manual_seed(0)
    if main == "input_ids":
        yield _ids()
        yield _ids(32)
    elif main.startswith("pixel_values"):
        inner = getattr(config, "vision_config", config)
        size = getattr(inner, "image_size", None)
        sizes = size if isinstance(size, list | tuple) else [size or 32] * 2
        channels = getattr(inner, "num_channels", None) or 3
        frames = getattr(inner, "num_frames", None) or 4
        yield torch.randn(ROWS, channels, *sizes[-2:], generator=draw)
        yield torch.randn(ROWS, frames, channels, *sizes[-2:], generator=draw)
        yield torch.randn(ROWS, channels, 64, 64, generator=draw)
    elif main == "input_features":
        for bins in {getattr(config, "num_mel_bins", 0) or 16, 16, 32}:
            yield torch.randn(ROWS, bins, FRAMES, generator=draw)
            yield torch.randn(ROWS, FRAMES, bins, generator=draw)
            yield torch.randn(ROWS, bins, 2 * VOCABULARY, generator=draw)
    elif main == "input_values":
        yield torch.randn(ROWS, SAMPLES, generator=draw)
        yield torch.randn(ROWS, 1, SAMPLES, generator=draw)
        yield torch.randn(ROWS, FRAMES, 16, generator=draw)


def _decoder(model: PreTrainedModel) -> dict[str, Tensor]:
    takes = inspect.signature(model.forward).parameters
    reads = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes
    return {"decoder_input_ids": _ids()} if reads else {}


def _ids(length: int = LENGTH) -> Tensor:
    """Return ids of ordinary words; two rows differ."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_WORD, VOCABULARY, (ROWS, length), generator=draw)
