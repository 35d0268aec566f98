"""Tests by running it whether a module applies its weight and does nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (nn.Linear, Conv1D, nn.Embedding)
"""Classes known to be plain; their subclasses are tried."""

SCALES = (1.0, 64.0)
"""Scales of the inputs: clipping or quantization shows at one of them."""


def oddity(module: nn.Module) -> str | None:
    """Return why a module's matrix cannot be replaced by another of its shape, or None.

    A subclass is run on random inputs, in training and eval mode, in its own dtype, and must match
    a plain layer. It is run as a copy that shares the weight, so hooks, training flags, buffers and
    random generators do not change.

    Example:
        >>> class Same(nn.Linear):
        ...     def forward(self, x):
        ...         return x @ self.weight.T + self.bias
        >>> class Twice(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> oddity(Same(3, 2)), oddity(Twice(3, 2))
        (None, 'Twice adds behaviour of its own')
    """
    name = type(module).__name__
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"{name} computes its weight from something else"
    if type(module) in PLAIN and "forward" not in vars(module):
        return None
    extra = {own for own, _ in module.named_parameters()} - {"weight", "bias"}
    if extra or any(module.children()):
        return f"{name} has more than a weight and a bias"
    return None if _agrees(module) else f"{name} adds behaviour of its own"


def _agrees(module: nn.Module) -> bool:
    """Return whether a module with a weight and a bias computes the plain layer."""
    weight: Any = module.weight
    if weight.is_meta and any(True for _ in module.buffers()):
        return False  # their values are unknown
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for training in (False, True):
            twin = _twin(module).train(training)
            for inputs in _inputs(twin):
                expected = _plain(twin, inputs)
                try:
                    found = twin(inputs)
                except Exception:  # the model's code may raise anything; it is not plain then
                    return False
                if not _same(found, expected):
                    return False
    return True


def _twin(module: nn.Module) -> nn.Module:
    """Return a copy without hooks that shares the parameters, or has random ones on meta."""
    memo: dict[int, Any] = {
        id(hooks): OrderedDict() for name, hooks in vars(module).items() if name.endswith("_hooks")
    }
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in module.parameters():
        held = parameter
        if parameter.is_meta:
            drawn = torch.randn(parameter.shape, generator=generator, device="cpu").to(
                parameter.dtype
            )
            held = nn.Parameter(drawn, requires_grad=False)
        memo[id(parameter)] = held
    return copy.deepcopy(module, memo)


def _inputs(module: nn.Module) -> list[Tensor]:
    """Return test inputs of a module: ids, or vectors with one and two batch axes."""
    weight: Any = module.weight
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(module, nn.Embedding):
        ids = torch.randint(module.num_embeddings, (2, 5), generator=generator, device="cpu")
        ids[0, 0], ids[1, 0] = module.padding_idx or 0, module.num_embeddings - 1
        return [ids.to(weight.device)]
    width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
    drawn = [
        scale * torch.randn(2, 3, width, generator=generator, device="cpu") for scale in SCALES
    ]
    tried = [x.to(weight.device, weight.dtype) for x in drawn]
    return [*tried, tried[0][0]]


def _plain(module: nn.Module, inputs: Tensor) -> Tensor:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if weight is None:
        raise ValueError("a matrix without a weight")
    if isinstance(module, nn.Embedding):
        return F.embedding(inputs, weight)
    return F.linear(inputs, weight.T if isinstance(module, Conv1D) else weight, bias)


def _same(found: Any, expected: Tensor) -> bool:
    """Return whether an output matches the expected one, up to rounding in its dtype."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype:
        return False
    error = (found.double() - expected.double()).norm()
    bound = 4 * torch.finfo(expected.dtype).eps * expected.double().norm()
    return bool(error <= bound)
