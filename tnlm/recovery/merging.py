"""Merges LoRAs beside low-rank layers into the layers, and updates their entries and the report."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.entries import Entry, build, network_of
from tnlm.checkpoint.reports import known_report
from tnlm.checkpoint.transformers_plugin import attach, config_of
from tnlm.errors import ModelError, OptionError, RankError
from tnlm.layers.adapters import Lora
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.swap import Swap
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.recovery.compensate import concatenate, retruncate
from tnlm.tensors.contraction import chain
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Cost, Factors
from tnlm.utils.undo import attempt


def check_merge(model: nn.Module, ranks: Mapping[str, int], merge: str) -> None:
    """Raise a `TnlmError`, before training, unless LoRAs of these ranks can be merged this way."""
    if merge == "adapter":
        return
    if merge == "factors":
        for name in ranks:
            weight: Any = model.get_submodule(name).weight
            if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
                raise ModelError(
                    f"{name} is quantized, so no LoRA can be merged into it; use merge='adapter'"
                )
        return
    config = _config(model)
    for name, rank in ranks.items():
        entry = entry_of(config, name)
        if entry is not None and "precision" in entry:
            raise ModelError(
                f"{name} is stored in few bits, so merge={merge!r} cannot change its factors; use "
                "merge='adapter'"
            )
        if entry is None or entry.get("format") != "low-rank" or entry["kind"] != "linear":
            narrowed = entry is not None and entry["kind"] == "narrowed"
            why = "has lost channels as well" if narrowed else "is not"
            raise OptionError(f"merge={merge!r} needs low rank, but {name} {why}; use on='factors'")
        if entry.get("shared"):
            raise OptionError(f"{name} shares a factor with other blocks; use on='factors'")
        if merge == "concatenate":
            _check_growth(name, entry, rank)


def _check_growth(name: str, entry: Entry, rank: int) -> None:
    grown = entry["options"]["rank"] + rank
    rows, columns = entry["shape"]
    if grown > min(rows, columns) or network_of(_of_rank(entry, grown)).params > rows * columns:
        raise RankError(
            f"{name}: rank {entry['options']['rank']} + {rank} is larger than a dense "
            f"{rows}x{columns} matrix; use merge='retruncate', or a smaller rank"
        )


def merge_layers(
    model: PreTrainedModel, loras: Mapping[str, Lora], merge: str, metrics: Mapping[str, Metric]
) -> None:
    """Merge LoRAs into the layers beside them: all, or none if one fails."""
    old = _config(model)
    config = copy.copy(old)
    config.modules = copy.deepcopy(old.modules)
    made: dict[str, FactorizedLinear] = {}
    plans: dict[str, Entry] = {}
    for name, lora in loras.items():
        entry = entry_of(config, name)
        layer = model.get_submodule(name)
        if entry is None or not isinstance(layer, FactorizedLinear):
            raise ModelError(f"{name} does not match its entry in config.json")
        grown, made[name] = _merged(layer, entry, lora, merge, metrics.get(name, Metric()))
        entry.update(grown)
        plans[name] = grown
    swap = Swap(model)

    def put() -> None:
        for name, layer in made.items():
            swap.replace(name, layer)
        attach(model, config)
        _replan(model, plans)

    attempt(put, swap.undo)


@torch.no_grad()
def _merged(
    layer: FactorizedLinear, entry: Entry, lora: Lora, merge: str, metric: Metric
) -> tuple[Entry, FactorizedLinear]:
    factors = layer.factors()
    left, right = (factors[side].double() for side in ("left", "right"))
    if merge == "concatenate":
        left, right = concatenate(left, right, lora)
    else:
        left, right = retruncate(left, right, lora, metric)
    grown = _of_rank(entry, left.shape[1])
    like: Any = layer.get_submodule("left").weight
    made: Any = build(grown, device=like.device, dtype=like.dtype)
    stored: Factors = fix(network_of(grown), {"left": left, "right": right})
    made.store(stored)
    made.requires_grad_(bool(like.requires_grad)).train(layer.training)
    made.bias = layer.bias  # the same parameter, since other modules may share it
    made.keep_rebuilt(layer.rebuilt)
    return grown, made


def _of_rank(entry: Entry, rank: int) -> Entry:
    """Return the entry of a matrix at another rank."""
    grown = {**entry, "options": {**entry["options"], "rank": rank}}
    return {**grown, "order": list(chain(network_of(grown)).order)}


def entry_of(config: TnlmConfig, name: str) -> Entry | None:
    """Return the entry of a layer, or of a part of a fused module."""
    if name in config.modules:
        found: Entry = config.modules[name]
        return found
    module, _, part = name.rpartition(".")
    parts = config.modules.get(module, {}).get("parts", ())
    return next((entry for entry in parts if entry["name"] == part), None)


def _config(model: nn.Module) -> TnlmConfig:
    config = config_of(model)
    if config is None:
        raise ModelError("the model is not compressed by tnlm; use on='factors'")
    return config


def _replan(model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
    """Update the ranks and costs of merged layers in the report, if there is one."""

    def grown(layer: LayerPlan) -> LayerPlan:
        if layer.name not in entries:
            return layer
        entry = entries[layer.name]
        new, old = network_of(entry), network_of({**entry, "options": dict(layer.spec)})
        left: Any = model.get_submodule(f"{layer.name}.left")
        more, work = new.params - old.params, chain(new).macs - chain(old).macs
        size = more * left.weight.element_size() + new.index_bytes - old.index_bytes
        after = layer.after + Cost(more, size, work)
        return replace(layer, spec=entry["options"], after=after)

    _edit(model, grown)


def charge(
    model: PreTrainedModel, healed: Sequence[str], kept: Mapping[str, Lora], seconds: float
) -> None:
    """Add kept LoRAs to the costs in the report, and drop errors that no longer hold.

    Args:
        model: a model; nothing is done if it has no report.
        healed: names of the layers that changed.
        kept: the kept LoRAs, by the name of the layer or of its factor.
        seconds: the time that healing took.
    """

    def charged(layer: LayerPlan) -> LayerPlan:
        mine = set(layer.name.split("+"))
        if not mine & set(healed):
            return layer
        loras = [lora for name, lora in kept.items() if _owners(name) & mine]
        params = sum(lora.params for lora in loras)
        size = sum(lora.params * lora.A.element_size() for lora in loras)
        return replace(layer, error=None, after=layer.after + Cost(params, size, params))

    _edit(model, charged, seconds)


def _owners(name: str) -> set[str]:
    return {name, name.rpartition(".")[0]}


def _edit(model: PreTrainedModel, edit: Any, seconds: float = 0.0) -> None:
    report = known_report(model)
    if report is not None:
        plan = replace(report.plan, layers=tuple(map(edit, report.plan.layers)))
        times = {**report.seconds, "heal": report.seconds.get("heal", 0.0) + seconds}
        model.tnlm_report = replace(report, plan=plan, seconds=times)  # type: ignore[assignment]
