"""Selects the matrices of a model to compress, and gives reasons for those it skips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from tnlm.errors import TargetError, did_you_mean
from tnlm.layers.expert_layout import ExpertLayout, layout_of
from tnlm.layers.fused import Layout
from tnlm.layers.unfolded import objection
from tnlm.targets.alike import aliases, incomplete
from tnlm.targets.base import Matrix, Member, Selector
from tnlm.targets.dropping import droppable, dropped
from tnlm.targets.matching import (
    ALL_LINEAR,
    Ends,
    check_selectors,
    matches,
    names_part,
    names_target,
)
from tnlm.targets.matrix import matrices_of
from tnlm.targets.mixtures import expert_shares
from tnlm.targets.parts import fused_layouts
from tnlm.targets.plain import PLAIN, oddity
from tnlm.targets.table import TableTarget
from tnlm.utils.residency import resident

AROUND = "outside the model's blocks, as heads are; name it in targets= to compress it"
UNNAMED, IGNORED = "targets= does not choose it", "ignore= names it"


@dataclass
class Selection:
    """The selected targets, and the reasons for skipping others.

    Attributes:
        targets: the targets, in the model's order.
        skipped: reasons why selected modules cannot be compressed, by name.
        unwanted: reasons why other modules with matrices were not selected, by name.
    """

    targets: list[Member] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unwanted: dict[str, str] = field(default_factory=dict)


def select(
    model: PreTrainedModel,
    targets: Selector = ALL_LINEAR,
    ignore: Selector | None = None,
    *,
    split: bool = True,
) -> Selection:
    """Select the matrices of a model to compress.

    Args:
        model: any Hugging Face model.
        targets: ``"all-linear"`` (every linear weight in the model's blocks, without heads, poolers
            or projections around them; without blocks, all but the output head), ``"embeddings"``,
            ``"token-embeddings"`` (without those of positions and types), ``"odd-blocks"`` (linear
            weights of every second block), ``"experts"`` (the routed experts of every block, some
            of which may be dropped), a regular expression that must match a module's full name, a
            list of names or endings (as in PEFT) or of these words, or a module class.
        ignore: modules to leave dense, in the same form.
        split: treat fused projections as several matrices, named like children of their modules,
            e.g. ``qkv_proj.q``; otherwise as one each. A module's name selects all its parts.

    Returns:
        The targets in the model's order.

    Raises:
        TargetError: if nothing matches, or ``ignore`` matches nothing.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> chosen = select(LlamaForCausalLM(tiny), ["q_proj", "down_proj"])
        >>> [target.name for target in chosen.targets]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.mlp.down_proj']
    """
    check_selectors(targets=targets, ignore=[] if ignore is None else ignore)
    selection = Selection()
    uses = _uses(model)
    ends = Ends.of(model)
    shares = expert_shares(model)
    all_linear = ALL_LINEAR in ([targets] if isinstance(targets, str | type) else targets)
    layouts = fused_layouts(model) if split else {}
    claimed: set[int] = set()
    smaller = dropped(model)
    for name, module in model.named_modules():
        if not isinstance(module, Matrix):
            continue
        if ignore and matches(name, module, ignore, ends):
            selection.unwanted[name] = IGNORED
            continue
        if name in smaller:
            selection.skipped[name] = "it lost the rows of the experts that were dropped"
            continue
        whole, layout = matches(name, module, targets, ends), layouts.get(name)
        parts = [] if layout is None else [f"{name}.{part}" for part in layout.parts]
        chosen = {part for part in parts if whole or names_part(part, targets)}
        ignored = {part for part in chosen if ignore and names_part(part, ignore)}
        if not whole and not chosen:
            if all_linear and ends.is_around(name, module):
                selection.skipped[name] = AROUND
            selection.unwanted[name] = UNNAMED
            continue
        found = _describe(name, module, uses[_weight_id(module)], model, layout)
        if isinstance(found, str):
            selection.skipped[name] = found
        elif _weight_id(module) not in claimed:
            claimed.add(_weight_id(module))
            share = shares.get(name, 1.0)
            for target in found:
                if not parts or target.name in chosen - ignored:
                    selection.targets.append(replace(target, share=share))
                else:
                    selection.unwanted[name] = IGNORED if target.name in ignored else UNNAMED
    selection.targets += [
        t
        for t in droppable(model)
        if names_target(targets, t) and not (ignore and names_target(ignore, t))
    ]
    if all_linear:
        selection.skipped |= _stacked(model)
    if not selection.targets:
        raise _nothing(model, targets, ignore, selection.skipped)
    if ignore:
        _check_ignored(model, ignore, ends, layouts)
    _check_experts(model, selection)
    return selection


def _check_experts(model: nn.Module, selection: Selection) -> None:
    """Raise `TargetError` if a matrix is selected for only some experts of a module."""
    for name, count, total in incomplete(model, [t.module for t in selection.targets]):
        raise TargetError(
            f"{count} of {total} experts are chosen for {name}; the experts of a module are "
            f"compressed together: name {name} in targets= or ignore=, or none of it"
        )


def _check_ignored(
    model: nn.Module, ignore: Selector, ends: Ends, layouts: Mapping[str, Layout]
) -> None:
    """Raise `TargetError` if ``ignore`` matches nothing, which is probably a mistake."""
    matrices = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Matrix)
    ]
    parts = [f"{name}.{part}" for name, layout in layouts.items() for part in layout.parts]
    if not any(matches(name, module, ignore, ends) for name, module in matrices) and not any(
        names_part(part, ignore) for part in parts
    ):
        endings = {name.rpartition(".")[2] for name, _ in matrices}
        hint = did_you_mean(str(ignore), endings)
        raise TargetError(f"ignore={ignore!r} matches no matrix{hint}", argument="ignore")


def _uses(model: nn.Module) -> dict[int, list[str]]:
    """Return the modules that hold each weight."""
    uses: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            uses.setdefault(_weight_id(module), []).append(name)
    return uses


def _weight_id(module: nn.Module) -> int:
    """Return a key for a weight; one that is recomputed at every access is its module's own."""
    weight = module._parameters.get("weight")
    return id(module if weight is None else weight)


def _describe(
    name: str, module: Matrix, users: list[str], model: nn.Module, layout: Layout | None
) -> Sequence[Member] | str:
    """Return the matrices of a module, or why it is left dense."""
    modules = [model.get_submodule(user) for user in users]
    if any(getattr(other, "_hf_hook", None) for other in modules):
        return "its weight is offloaded by accelerate; compress before dispatching"
    for user, other in zip(users, modules, strict=True):
        tried = [] if type(other) in PLAIN else [user]
        with resident(model, *tried):
            found = oddity(other)
        if found is not None:
            return f"{found}, at {user}"
    embeddings = [
        u for u, other in zip(users, modules, strict=True) if isinstance(other, nn.Embedding)
    ]
    if not embeddings:
        if len(users) > 1:
            return f"its weight is shared with {', '.join(u for u in users if u != name)}"
        return list(matrices_of(name, module, layout))  # type: ignore[arg-type]  # none is a table
    table = model.get_submodule(embeddings[0])
    if len(embeddings) > 1:
        return f"several embeddings share the weight: {', '.join(embeddings)}"
    if table.max_norm is not None or table.sparse:
        return "an embedding with max_norm or sparse gradients"
    shape = (table.num_embeddings, table.embedding_dim)
    tied = tuple(user for user in users if user != embeddings[0])
    return [TableTarget(embeddings[0], embeddings[0], shape, tied)]


def _stacked(model: nn.Module) -> dict[str, str]:
    """Return the modules with 3-D parameters, such as experts, and why they are left."""
    return {
        f"{name}.{part}": _why_stacked(module)
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")  # kernels of convolutions
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def _why_stacked(module: nn.Module) -> str:
    """Return why a module's 3-D parameters are not matrices."""
    layout = layout_of(module)
    if not isinstance(layout, ExpertLayout):
        return f"a 3-D parameter; {layout}"
    return objection(module) or "a 3-D parameter of experts, which compress and plan unfold"


def _nothing(
    model: nn.Module, targets: Selector, ignore: Selector | None, skipped: dict[str, str]
) -> TargetError:
    endings = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Matrix)}
    endings |= {n.rpartition(".")[2] for names in aliases(model).values() for n in names}
    hint = did_you_mean(targets if isinstance(targets, str) else "", endings)
    if isinstance(targets, str) and targets in endings:  # a pattern must match the whole name
        hint = f"; use [{targets!r}], a list of endings"
    if targets == ALL_LINEAR:
        hint += _others(model)
    reasons = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:3])
    return TargetError(f"no matrix matches targets={targets!r}, ignore={ignore!r}{hint}{reasons}")


def _others(model: nn.Module) -> str:
    """Return a hint if most parameters are not in linear modules or embeddings."""
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, Matrix):
            own = (p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
            sizes[type(module).__name__] += sum(own)
    kinds = [kind for kind, size in sizes.most_common(2) if size]
    return f"; most parameters are in {' and '.join(kinds)}, not linear modules" if kinds else ""
