"""LoRA adapters on a frozen model, for as long as a block of code runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnlm.errors import OptionError, RankError
from tnlm.recovery.groups import matrix


@dataclass(frozen=True)
class Adapter:
    """A frozen matrix W and what is trained beside it: W + s B A.

    Attributes:
        base: the linear module that holds W.
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        scale: s.
    """

    base: nn.Module
    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def merged(self) -> Tensor:
        """Return W + s B A in the adapter's dtype."""
        up, down = self.up.detach(), self.down.detach()
        return torch.addmm(matrix(self.base).to(up.dtype), up, down, alpha=self.scale)


def check_adapters(model: PreTrainedModel, modules: Sequence[str], rank: int, alpha: int) -> None:
    """Refuse adapters that cannot be made.

    Raises:
        OptionError: if peft is not installed, or ``alpha`` is below 1.
        RankError: if a matrix has fewer rows or columns than ``rank``.
    """
    if importlib.util.find_spec("peft") is None:
        raise OptionError("adapters are trained with peft: pip install 'tnlm[train]'")
    if alpha < 1:
        raise OptionError(f"alpha={alpha}: at least 1 is wanted")
    for name in modules:
        most = min(matrix(model.get_submodule(name)).shape)
        if not 1 <= rank <= most:
            raise RankError(f"{name}: rank={rank}, but an adapter here takes 1 to {most}")


@contextmanager
def adapted(
    model: PreTrainedModel, modules: Sequence[str], rank: int, alpha: int
) -> Iterator[dict[str, Adapter]]:
    """Put adapters on a model and freeze the rest; take them off after, and leave no trace.

    A starts random, from torch's generator, and B at zero. Both are float32 at least.

    Args:
        model: its flags, of training and of gradients, are restored as well.
        modules: dotted names of linear modules.
        rank: of every adapter.
        alpha: the scale is alpha / rank.

    Yields:
        The adapters by module name. Their parameters outlive the block.
    """
    from peft import LoraConfig, inject_adapter_in_model

    attributes = dict(vars(model))
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    bases = {name: model.get_submodule(name) for name in modules}
    transposed = any(isinstance(module, Conv1D) for module in bases.values())
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(modules), fan_in_fan_out=transposed
    )
    try:
        inject_adapter_in_model(config, model)
        yield {name: _read(model.get_submodule(name), base) for name, base in bases.items()}
    finally:
        for name, base in bases.items():
            model.set_submodule(name, base)
        vars(model).clear()  # peft leaves its config there
        vars(model).update(attributes)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


def _read(layer: Any, base: nn.Module) -> Adapter:
    [(name, scale)] = layer.scaling.items()
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    for parameter in (down, up):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return Adapter(base, down, up, scale)
