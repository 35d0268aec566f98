"""Entries: plain descriptions of replaced modules, and the modules built from them.

An entry is what a checkpoint says about one module. It is checked against the module it replaces
before anything is allocated, because a checkpoint is untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import CheckpointError, TnlmError
from tnlm.layers.arranged import linear
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.shapes import shape_of
from tnlm.tensors.network import Network

Entry = dict[str, Any]
KINDS = ("linear", "dense", "sliced", "fused", "embedding", "head")


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
        _check_kind(entry["kind"], module)
        if bool(entry.get("conv1d")) != isinstance(module, Conv1D):
            raise CheckpointError(
                f"conv1d={entry.get('conv1d')!r}; {type(module).__name__} is there"
            )
        parts = entry["parts"] if entry["kind"] == "fused" else [entry]
        shape = _stacked_shape(parts) if entry["kind"] != "sliced" else _uncut_shape(entry)
        if shape != shape_of(module):
            raise CheckpointError(f"it is {_by(shape)}, but the model has {_by(shape_of(module))}")
        for part in parts:
            _check_part(part, getattr(module, "bias", None) is not None)
        build(entry, device="meta")  # shows whatever else is wrong
    except TnlmError as error:
        raise CheckpointError(f"config.json does not fit the model at {name}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"config.json has a broken entry for {name}: {error!r}") from error


def _check_kind(kind: Any, module: nn.Module) -> None:
    if kind not in KINDS:
        raise CheckpointError(f"kind={kind!r}; allowed: {', '.join(KINDS)}")
    if isinstance(module, nn.Embedding) != (kind == "embedding"):
        raise CheckpointError(f"kind={kind!r}, but the model has {type(module).__name__}")


def _stacked_shape(parts: list[Entry]) -> tuple[int, int]:
    """Return the shape of all parts together."""
    for part in parts:
        sizes = part["shape"]
        if len(sizes) != 2 or not all(type(size) is int and size >= 1 for size in sizes):
            raise CheckpointError(f"shape={sizes!r}; allowed: two whole numbers >= 1")
    widths = {part["shape"][1] for part in parts}
    names = {part.get("name") for part in parts}
    if len(widths) != 1 or len(names) != len(parts):
        raise CheckpointError("its parts must be there, of one width, and of different names")
    return sum(part["shape"][0] for part in parts), widths.pop()


def _uncut_shape(entry: Entry) -> tuple[int, int]:
    """Return the shape that a sliced matrix had."""
    shape, full = _stacked_shape([entry]), _stacked_shape([{"shape": entry["full"]}])
    axis = {"rows": 0, "columns": 1}[entry["cut"]]
    if shape[axis] > full[axis] or shape[1 - axis] != full[1 - axis]:
        raise CheckpointError(f"{_by(shape)} is no cut of {entry['cut']} of {_by(full)}")
    return full


def _check_part(part: Entry, biased: bool) -> None:
    added = part.get("bias_added") is True and not biased
    if part["bias"] is not (biased or added):
        has = "a" if biased else "no"
        raise CheckpointError(f"bias={part['bias']!r}, but the model has {has} bias there")
    if part["kind"] in ("dense", "sliced"):
        return
    wanted = "linear" if part["kind"] == "linear" else "embedding"
    if wanted not in get_format(part["format"]).kinds:
        raise CheckpointError(f"a {part['format']} cannot replace a {wanted}")
    network = network_of(part)
    if part.get("shared") is True:  # its input factor is counted once, in one of several blocks
        return
    if network.params > network.shape[0] * network.shape[1]:
        raise CheckpointError(f"{part['options']} is larger than the dense matrix")


def build(
    entry: Entry, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the (uninitialised) module that an entry describes."""
    kind = entry["kind"]
    if kind == "fused":
        parts = {part["name"]: build(part, device=device, dtype=dtype) for part in entry["parts"]}
        return FusedLinear(parts)
    rows, columns = entry["shape"]
    if kind in ("dense", "sliced"):
        return linear(rows, columns, bias=entry["bias"], device=device, dtype=dtype)
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
    if entry["kind"] == "sliced":
        module = _padded(entry, module)
    weight = _dense_weight(module)
    rows, columns = weight.shape
    factors = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    trained = any(p.requires_grad for p in factors)
    if entry["kind"] == "embedding":
        padding = entry["padding_idx"]
        return nn.Embedding(rows, columns, padding_idx=padding, _weight=weight, _freeze=not trained)
    bias = _fused_bias(module) if isinstance(module, FusedLinear) else module.bias
    if entry.get("conv1d"):
        dense: nn.Module = Conv1D(rows, columns)
        weight = weight.T
    else:
        dense = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
    if bias is not None:
        dense.bias = bias
    return dense


def _dense_weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight if isinstance(module, nn.Linear) else module.to_dense()  # type: ignore[operator]
    result: Tensor = weight.detach()
    return result


def _padded(entry: Entry, module: nn.Module) -> nn.Linear:
    """Return a sliced layer at its full size; channels that were dropped are zero."""
    small: Any = module
    rows, columns = entry["full"]
    full = nn.Linear(columns, rows, bias=small.bias is not None, device="meta")
    weight = small.weight.new_zeros(rows, columns)
    weight[: small.out_features, : small.in_features] = small.weight.detach()
    full.weight = nn.Parameter(weight, requires_grad=small.weight.requires_grad)
    if small.bias is not None:
        bias = small.bias.new_zeros(rows)
        bias[: small.out_features] = small.bias.detach()
        full.bias = nn.Parameter(bias, requires_grad=small.bias.requires_grad)
    return full


def _fused_bias(module: FusedLinear) -> nn.Parameter | None:
    biases = [getattr(module, name).bias for name in module.parts]
    if any(bias is None for bias in biases):
        return None
    trained = any(bias.requires_grad for bias in biases)
    return nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=trained)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
