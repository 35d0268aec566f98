"""Finds every parameter of two or more dimensions that a plan does not replace."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from tnlm.layers.unfolded import unfolded
from tnlm.plans.coverage import KEPT, Coverage, Left
from tnlm.plans.plan import LayerPlan
from tnlm.targets.alike import together
from tnlm.targets.base import Matrix, Member
from tnlm.targets.blocks import in_blocks
from tnlm.targets.ends import output_head
from tnlm.targets.mixtures import expert_shares, holds_experts
from tnlm.targets.selection import AROUND, IGNORED, UNNAMED, Selection

EMBEDDING, HEAD = "embedding", "head"
LINEAR = {AROUND: "around the blocks", UNNAMED: "not chosen", IGNORED: "ignored"}
"""Kinds of linear weights that were left, by the reason; other kinds cannot be replaced."""
CONVOLUTION = nn.modules.conv._ConvNd
OTHER = "a parameter of {}; only weights of linear modules and embeddings are replaced"
LEFT_OUT = "the plan leaves it out"


def coverage(model: PreTrainedModel, selection: Selection, layers: Sequence[LayerPlan]) -> Coverage:
    """Return what a plan leaves dense, grouped by kind, name without indices, and reason.

    Args:
        model: the dense model.
        selection: its targets, and why other weights were skipped.
        layers: the plan's decisions.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tnlm.targets.selection import select
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=2))
        >>> [each.name for each in coverage(model, select(model), []).left if not each.in_body]
        ['model.embed_tokens.weight', 'lm_head.weight']
    """
    replaced, kept = _planned(model, selection.targets, layers)
    blocks, head, experts = in_blocks(model), output_head(model), expert_shares(model).keys()
    groups: dict[tuple[str, str, str, bool], Left] = {}
    body = 0
    for name, owner, parameter in _parameters(model):
        module = model.get_submodule(owner)
        kind = HEAD if module is head else _kind(owner, module, experts)
        in_body = (owner in blocks or not blocks) and kind not in (EMBEDDING, HEAD)
        body += parameter.numel() if in_body else 0
        params = parameter.numel() - replaced.get(id(parameter), 0)
        if not params:
            continue
        reason = kept.get(id(parameter)) or _reason(name, owner, module, selection)
        kind = KEPT if id(parameter) in kept else kind or LINEAR.get(reason, "passed over")
        key = kind, re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason, in_body
        same = groups.get(key, Left(*key[:3], count=0, params=0, in_body=in_body))
        groups[key] = replace(same, count=same.count + 1, params=same.params + params)
    return Coverage(body, tuple(groups.values()))


def _planned(
    model: nn.Module, targets: Sequence[Member], layers: Sequence[LayerPlan]
) -> tuple[dict[int, int], dict[int, str]]:
    """Return how many parameters of each weight are replaced, and why others are kept."""
    decided = {name: layer for layer in layers for name in layer.name.split("+")}
    places = [name for name, _ in unfolded(model)]
    replaced: dict[int, int] = {}
    kept: dict[int, str] = {}
    for target in targets:
        weights, layer = target.held(model), decided.get(together(places, target.name))
        whole = sum(weight.numel() for weight in weights)
        for weight in weights:
            if layer is None or not layer.replaced:
                kept[id(weight)] = (layer and layer.note) or LEFT_OUT
            else:
                own = weight.numel() * target.params // whole
                replaced[id(weight)] = replaced.get(id(weight), 0) + own
    return replaced, kept


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield every parameter of two or more dimensions once, with its name and its module's name.

    Biases of unfolded experts are included, since they have two dimensions once folded.
    """
    seen: set[int] = set()
    experts = tuple(f"{place}." for place, _ in unfolded(model))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (parameter.dim() > 1 or name.startswith(experts)) and id(parameter) not in seen:
            seen.add(id(parameter))
            before, parametrized, _ = name.partition(".parametrizations.")
            yield name, before if parametrized else name.rpartition(".")[0], parameter


def _kind(name: str, module: nn.Module, experts: Collection[str]) -> str:
    """Return the kind of a module's parameters; empty for linear weights."""
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if name in experts or holds_experts(name, module):
        return "experts"
    if isinstance(module, CONVOLUTION):
        return "convolution"
    return "" if isinstance(module, Matrix) else "other"


def _reason(name: str, owner: str, module: nn.Module, selection: Selection) -> str:
    """Return why a parameter was left."""
    skipped = selection.skipped
    if name.endswith(".bias") and isinstance(module, Matrix):
        return "a bias of experts"
    if not isinstance(module, Matrix):
        return skipped.get(name) or OTHER.format(type(module).__name__)
    parts = (why for part, why in skipped.items() if part.startswith(f"{owner}."))
    return skipped.get(owner) or next(parts, "") or selection.unwanted.get(owner, LEFT_OUT)
