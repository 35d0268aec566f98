"""Random initial weights for a model built with factorized matrices."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.errors import ModelError
from tnlm.targets.base import Member
from tnlm.tensors.gauge import fix
from tnlm.tensors.gaussian import gaussian
from tnlm.tensors.network import Factors, Network

SAMPLE = 2**20
"""Approximate number of embedding entries drawn to estimate their initial deviation."""


def initialize(
    model: PreTrainedModel,
    replaced: Sequence[Member],
    described: TnlmConfig,
    device: torch.device,
    seed: int,
) -> dict[str, float]:
    """Initialise every module that stays dense, and sample the initial weights of the others.

    The architecture initialises one module of each kind to be replaced, as the sample.

    Args:
        model: dense, on the meta device.
        replaced: targets in the modules to be replaced.
        described: names the modules to be replaced.
        device: where the tensors are allocated.
        seed: draws the weights.

    Returns:
        The initial standard deviation of each module to be replaced, by name.
    """
    for name, module in model.named_modules():
        vars(module).pop("_is_hf_initialized", None)  # set on the meta device
        if name not in described.modules:
            module.to_empty(device=device, recurse=False)
    kinds = {target.module: re.sub(r"\d+", "#", target.module) for target in replaced}
    firsts = {kind: name for name, kind in reversed(kinds.items())}
    dense = {name: model.get_submodule(name) for name in firsts.values()}
    for name, module in dense.items():
        model.set_submodule(name, _stand_in(module).to_empty(device=device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.initialize_weights()
    stds = {}
    for kind, name in firsts.items():
        drawn: Any = model.get_submodule(name).weight
        stds[kind] = 0.0 if drawn.is_meta else float(drawn.detach().double().std())
        model.set_submodule(name, dense[name])
    return {name: stds[kind] for name, kind in kinds.items()}


def _stand_in(module: nn.Module) -> nn.Module:
    """Return a module of the same kind without data; for an embedding, only some rows."""
    if not isinstance(module, nn.Embedding):
        return copy.deepcopy(module)
    rows = min(module.num_embeddings, -(-SAMPLE // module.embedding_dim))
    return nn.Embedding(rows, module.embedding_dim, device="meta", dtype=module.weight.dtype)


def allocate(model: PreTrainedModel, described: TnlmConfig, device: torch.device) -> None:
    """Allocate the tensors of the factorized modules, and tie those that are shared."""
    for name in described.modules:
        model.get_submodule(name).to_empty(device=device)
    # model.tie_weights() would read the weight of a head with a bias, and so rebuild it.
    for name, source in model.all_tied_weights_keys.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, model.get_parameter_or_buffer(source))


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    replaced: Sequence[Member],
    described: TnlmConfig,
    stds: Mapping[str, float],
    seed: int,
) -> None:
    """Draw the factors, and set biases to 0.

    Args:
        model: with the factorized modules in place.
        replaced: targets of the modules that were replaced.
        described: names the replaced modules, including tied heads.
        stds: the standard deviation of each target's matrix, by module.
        seed: draws the weights.

    Raises:
        ModelError: if the architecture initialises a matrix to zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    for target in replaced:
        module: Any = model.get_submodule(target.path)
        std = stds[target.module]
        if std == 0.0:
            raise ModelError(
                f"{target.name} is initialised to zeros in this architecture, but factors cannot "
                "learn from zeros; name it in ignore=",
                argument="ignore",
            )
        if isinstance(module, nn.Linear):  # a dense part of a fused module
            module.weight.normal_(std=std, generator=generator)
            continue
        factors = gaussian(module.network, std, generator)
        if getattr(module, "padding_idx", None) is not None:
            _clear(module.network, factors, module.padding_idx)
        module.store(fix(module.network, factors))
    for name in described.modules:
        for key, parameter in model.get_submodule(name).named_parameters():
            if key.rpartition(".")[2] == "bias":
                parameter.zero_()


def _clear(network: Network, factors: Factors, row: int) -> None:
    """Set a row of a table to 0, like the padding row of a dense one."""
    for name, modes in network.factors.items():
        if modes.startswith(network.out):
            factors[name][row] = 0.0
