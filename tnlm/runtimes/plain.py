"""transformers itself, and all that reads its checkpoints: one width for all blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tnlm.checkpoint.configs import clear_guard
from tnlm.errors import ModelError
from tnlm.runtimes.base import Prepared, Runtime
from tnlm.runtimes.weights import generation_config, plain_weights

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim")
"""Under which names configs give the width of feed-forward layers."""


def _prepare(model: PreTrainedModel, tokenizer: Any, _: str) -> Prepared:
    generation = generation_config(model)
    weights = plain_weights(model)
    made = skeleton(
        model,
        weights,
        "its config has one width for all blocks. Compress with portable='transformers', which "
        "gives all blocks the same width",
    )
    made.load_state_dict(weights, strict=False, assign=True)
    made.tie_weights()
    if generation is not None:
        made.generation_config = generation

    def write(directory: Path) -> None:
        made.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    return Prepared(sum(p.numel() * p.element_size() for p in made.parameters()), write)


def skeleton(model: PreTrainedModel, weights: Mapping[str, Tensor], advice: str) -> PreTrainedModel:
    """Return a model without values whose parameters have the shapes of some weights.

    Args:
        model: of the same class.
        weights: by the names of its parameters; only their shapes count.
        advice: what to do if the class has no place for the shapes, for the error.

    Raises:
        ModelError: if there is no such model.
    """
    config = _ordinary(model.config)
    for change in (None, *_smaller(config, weights)):
        tried = copy.deepcopy(config)
        if change is not None:
            setattr(tried, *change)
        with torch.device("meta"):
            made = type(model)(tried)
        wrong = [n for n, p in made.named_parameters() if weights[n].shape != p.shape]
        if not wrong:
            return made
    raise ModelError(
        f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}, and no {type(model).__name__} has that "
        f"shape there: {advice}",
        argument=("portable", "to"),
    )


def _ordinary(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a config that says nothing of a compressed model."""
    made = copy.deepcopy(config)
    vars(made).pop("quantization_config", None)
    clear_guard(made)
    return made


def _smaller(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Return the changes of a config that might give the widths of some weights."""
    sizes = sorted({size for tensor in weights.values() for size in tensor.shape})
    widths = {name: vars(config).get(name, 0) for name in WIDTHS}
    most = {name: sizes[-1] if width is None else width for name, width in widths.items()}
    return [(name, size) for name in WIDTHS for size in sizes if size < most[name]]


RUNTIME = Runtime(
    name="transformers",
    title="an ordinary checkpoint with a smaller feed-forward width",
    to="transformers",
    types=("model",),
    formats=("channels",),
    multiple=32,
    prepare=_prepare,
    allocation="even",
)
