"""Entries: plain descriptions of replaced modules, and the modules built from them.

An entry is what a checkpoint says about one module. It is checked against the module it replaces
before anything is allocated, because a checkpoint is untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import CheckpointError, TnlmError
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.network import Network

Entry = dict[str, Any]
KINDS = ("linear", "dense", "fused", "embedding", "head")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return the ``(out, in)`` shape of a linear, Conv1D or embedding module.

    Example:
        >>> shape_of(nn.Linear(3, 5))
        (5, 3)
    """
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def network_of(entry: Mapping[str, Any]) -> Network:
    """Return the network that an entry describes.

    Raises:
        TnlmError: for an unknown format or option, or a spec that the shape cannot have.
    """
    structure = get_format(entry["format"])
    rows, columns = entry["shape"]
    return structure.network((rows, columns), from_dict(structure.spec, entry["options"]))


def check_entry(name: str, entry: Any, module: nn.Module) -> None:
    """Raise `CheckpointError` unless an entry fits the module it replaces.

    Shapes must be the model's own, so that no entry can ask for more memory than the dense model.
    """
    try:
        if entry["kind"] not in KINDS:
            raise CheckpointError(f"kind={entry['kind']!r}; allowed: {', '.join(KINDS)}")
        shape = _entry_shape(entry)
        if shape != shape_of(module):
            raise CheckpointError(f"it is {_by(shape)}, but the model has {_by(shape_of(module))}")
        for part in _networks(entry):
            network = network_of(part)
            if network.params > network.shape[0] * network.shape[1]:
                raise CheckpointError(f"{part['options']} is larger than the dense matrix")
    except TnlmError as error:
        raise CheckpointError(f"config.json does not fit the model at {name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json has a broken entry for {name}: {error!r}") from error


def _entry_shape(entry: Mapping[str, Any]) -> tuple[int, int]:
    if entry["kind"] == "fused":
        rows = [int(part["shape"][0]) for part in entry["parts"]]
        return sum(rows), int(entry["parts"][0]["shape"][1])
    rows, columns = entry["shape"]
    return int(rows), int(columns)


def _networks(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = entry["parts"] if entry["kind"] == "fused" else [entry]
    return [part for part in parts if part["kind"] != "dense"]


def build(
    entry: Entry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the (uninitialised) module that an entry describes."""
    kind = entry["kind"]
    if kind == "fused":
        parts = {part["name"]: build(part, device=device, dtype=dtype) for part in entry["parts"]}
        return FusedLinear(parts)
    rows, columns = entry["shape"]
    if kind == "dense":
        return nn.Linear(columns, rows, bias=entry["bias"], device=device, dtype=dtype)
    network = network_of(entry)
    if kind == "embedding":
        table = FactorizedEmbedding(network, device=device, dtype=dtype)
        table.padding_idx = entry["padding_idx"]
        return table
    if kind == "head":
        return FactorizedHead(network, bias=entry["bias"], device=device, dtype=dtype)
    return FactorizedLinear(
        network, bias=entry["bias"], order=entry["order"], device=device, dtype=dtype
    )


def dense_module(entry: Entry, module: nn.Module) -> nn.Module:
    """Return the ordinary module, with the same weight, that a built module stands for."""
    weight = module.to_dense().detach()  # type: ignore[operator]
    if entry["kind"] == "embedding":
        return nn.Embedding(*weight.shape, padding_idx=entry["padding_idx"], _weight=weight)
    bias = _fused_bias(module) if isinstance(module, FusedLinear) else module.bias
    rows, columns = weight.shape
    if entry.get("conv1d"):
        dense: nn.Module = Conv1D(rows, columns)
        weight = weight.T
    else:
        dense = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        dense.bias = bias  # type: ignore[assignment]
    return dense


def _fused_bias(module: FusedLinear) -> nn.Parameter | None:
    biases = [module.get_submodule(name).bias for name in module.parts]
    if any(bias is None for bias in biases):
        return None
    return nn.Parameter(torch.cat([bias.detach() for bias in biases]))  # type: ignore[union-attr]


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
