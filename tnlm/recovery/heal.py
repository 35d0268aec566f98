"""Healing: adapters on the factors are trained, then merged, so that nothing grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.recovery.adapters import adapted, check_adapters
from tnlm.recovery.examples import examples
from tnlm.recovery.training import SteadyTrainer, enough, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANK = 16


def heal(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 200_000,
    epochs: float | None = None,
    rank: int | None = None,
    alpha: int | None = None,
    learning_rate: float = 5e-4,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> PreTrainedModel:
    """Train LoRA adapters on every factor of a compressed model, merge them, and return it.

    With W = L R and adapters on both factors the layer becomes (L + s B A)(R + s B' A'): the merge
    is exact and adds no parameter, and an identity block of the gauge is kept as it is. Optimizer
    and gradients take the memory of adapters alone.

    Args:
        model: compressed by tnlm; changed in place at the very end.
        data: as for :func:`tnlm.recovery.training.finetune`.
        tokenizer: needed for texts.
        tokens: tokens it is trained on.
        epochs: instead of ``tokens``, how often it sees all data.
        rank: of the adapters; factors with no more rows or columns than that are left alone. If not
            given 16, or half the shorter side of the largest factor where that is less.
        alpha: the scale s is alpha / rank; twice the rank if not given.
        learning_rate: of AdamW, at its highest.
        batch_size: examples in a step.
        max_length: tokens of an example.
        seed: of the adapters' start and the order of examples.
        progress: show a progress bar.
        **arguments: more of `transformers.TrainingArguments`.

    Raises:
        OptionError: if peft is not installed, or a number is out of range.
        ModelError: if tnlm made no layer of the model that an adapter fits.
        TrainingError: if the loss stops being finite; the model is as it was.

    Source: LoRA, Hu et al. 2022, arXiv 2106.09685.
    """
    rank = _fitting_rank(model) if rank is None else rank
    alpha = 2 * rank if alpha is None else alpha
    names = factor_names(model, rank)
    check_adapters(model, names, rank, alpha)
    most = enough(tokens, epochs, max_length)
    found = examples(model, data, tokenizer, max_length=max_length, most=most, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with adapted(model, names, rank, alpha) as adapters:
            run(
                SteadyTrainer,
                model,
                found,
                tokens=tokens,
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                output_dir=None,
                seed=seed,
                progress=progress,
                **arguments,
            )
    with torch.no_grad():
        for adapter in adapters.values():
            weight: Any = adapter.base.weight
            weight.copy_(adapter.merged())
    return model


def _fitting_rank(model: PreTrainedModel) -> int:
    sides = [min(_shape(model, name)) for name in factor_names(model, 1)]
    return max(1, min(RANK, max(sides) // 2))


def _shape(model: PreTrainedModel, name: str) -> Sequence[int]:
    weight: Any = model.get_submodule(name).weight
    shape: Sequence[int] = weight.shape
    return shape


def factor_names(model: PreTrainedModel, rank: int) -> list[str]:
    """Return the names of the linear layers that tnlm made and that an adapter of a rank fits.

    Raises:
        ModelError: if there are none.
    """
    config = getattr(model.config, "quantization_config", None)
    made = tuple(getattr(config, "modules", {}))
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == parent or name.startswith(f"{parent}.") for parent in made)
        and min(module.weight.shape) > rank
    ]
    if not found:
        raise ModelError(f"no factor of this model has more than rank={rank} rows and columns")
    return found
