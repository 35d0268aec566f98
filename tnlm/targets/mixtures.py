"""The active part of mixtures of experts: a token uses k of E experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tnlm.layers.unfolded import UnfoldedExperts

ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_experts_per_topk",
    "num_selected_experts",
    "experts_per_token",
    "top_k_experts",
    "moe_router_topk",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k",
)
"""Names in configs of the number of experts to which a token is routed."""
FIXED = {"switch_transformers": 1, "nllb-moe": 2}
"""Model types whose code fixes this number, instead of the config."""


def expert_shares(model: nn.Module) -> dict[str, float]:
    """Return the fraction of tokens that each expert's module processes, by its name.

    Experts are modules of a list or dict called ``experts``. Shared experts, routers and dense
    layers process every token, and are not included.

    Example:
        >>> layer = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])})
        >>> layer.config = PreTrainedConfig(num_experts_per_tok=1)
        >>> expert_shares(layer)["experts.3"]
        0.25
    """
    found = {}
    for name, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList | nn.ModuleDict) and _is_routed(name)
        if listed or isinstance(module, UnfoldedExperts):
            matrices = {
                n: sum(p.dim() > 1 for p in c.parameters()) for n, c in module.named_children()
            }
            experts = [child for child, count in matrices.items() if count]
            share = _share(model, len(experts) or 1)
            for child in experts:
                inside = module.get_submodule(child).named_modules(prefix=f"{name}.{child}")
                found.update(dict.fromkeys((inner for inner, _ in inside), share))
    return found


def matrix_macs(model: nn.Module) -> int:
    """Return the multiply-adds per token of a model's matrices, with only active experts.

    This counts linear layers and stacked matrices of experts, which are parameters ``(E, ...)`` of
    a module with "expert" in its name or class. If no config has the number of active experts, all
    count.
    """
    shares = expert_shares(model)
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            total += module.weight.numel() * shares.get(name, 1.0)
        else:
            total += sum(size * share for size, share in _stacked(model, name, module))
    return int(total)


def holds_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module has "expert" in its name or class, or is in one called experts.

    Example:
        >>> holds_experts("layers.0.mlp.experts", nn.Module()), holds_experts("mlp", nn.Module())
        (True, False)
    """
    kind = type(module).__name__.lower()
    return "expert" in name.rpartition(".")[2].lower() + kind or ".experts." in f"{name}."


def _stacked(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[int, float]]:
    """Yield the sizes of stacked expert matrices, and the fraction of them that is active."""
    if not holds_experts(name, module):
        return
    routed = (
        "shared" not in name
    )  # the class may be named after the model, such as GraniteMoeShared
    for parameter in module.parameters(recurse=False):
        experts = _experts(model, parameter.shape)
        if experts:
            yield parameter.numel(), _share(model, experts) if routed else 1.0


def _experts(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the number of matrices in a parameter, concatenated by rows as in DBRX, or None."""
    if len(shape) == 3:
        return shape[0]
    for config in _configs(getattr(model, "config", None)):
        count = getattr(config, "moe_num_experts", None)
        if len(shape) == 2 and isinstance(count, int) and shape[0] > count and not shape[0] % count:
            return count
    return 0


def _is_routed(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith("experts") and "shared" not in last


def _share(model: nn.Module, experts: int) -> float:
    """Return k / E."""
    for config in _configs(getattr(model, "config", None)):
        if config.model_type in FIXED:
            return min(FIXED[config.model_type] / experts, 1.0)
        for name in ACTIVE:
            asked = getattr(config, name, None)
            values: list[Any] = list(asked) if isinstance(asked, list | tuple) else [asked]
            if values and all(isinstance(k, int) and 1 <= k <= experts for k in values):
                return float(sum(values) / len(values) / experts)
    return 1.0


def _configs(config: Any) -> Iterator[PreTrainedConfig]:
    """Yield a config and its nested configs, such as that of a text tower."""
    if isinstance(config, PreTrainedConfig):
        yield config
        held: Mapping[str, Any] = vars(config)
        for value in held.values():
            yield from _configs(value)
