"""Which matrices of a model are compressed, and how each is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import TargetError, did_you_mean
from tnlm.layers.expert_layout import ExpertLayout, layout_of
from tnlm.layers.fused import Layout
from tnlm.layers.unfolded import objection
from tnlm.targets.alike import aliases, incomplete
from tnlm.targets.base import Matrix, Member, Selector
from tnlm.targets.blocks import in_blocks
from tnlm.targets.dropping import droppable
from tnlm.targets.ends import input_table, output_head
from tnlm.targets.matrix import matrices_of
from tnlm.targets.mixtures import expert_shares
from tnlm.targets.parts import fused_layouts
from tnlm.targets.plain import oddity
from tnlm.targets.table import TableTarget
from tnlm.utils.names import block_of

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
EMBEDDINGS, TOKEN_EMBEDDINGS = "embeddings", "token-embeddings"
ODD_BLOCKS = "odd-blocks"
WORDS = (ALL_LINEAR, EMBEDDINGS, TOKEN_EMBEDDINGS, ODD_BLOCKS, EXPERTS)

AROUND = "outside the model's blocks, as heads are; name it in targets= to compress it"
UNNAMED, IGNORED = "targets= does not choose it", "ignore= names it"


@dataclass
class Selection:
    """The targets chosen, and what was passed over with the reason why.

    Attributes:
        targets: in the model's order.
        skipped: what was asked for, and cannot be served.
        unwanted: modules of matrices that were not asked for.
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
    """Choose the matrices of a model.

    Args:
        model: any Hugging Face model.
        targets: ``"all-linear"`` (every linear weight in the model's blocks: no heads, poolers or
            projections around them; where there are no blocks, every one but the output head),
            ``"embeddings"``, ``"token-embeddings"`` (without those of positions and types),
            ``"odd-blocks"`` (linear weights of every second block), ``"experts"`` (the routed
            experts of every block, of which some may be dropped), a regular expression that a
            module's name must match in full, a list of names or of their endings (as in PEFT) or of
            these words, or a module class.
        ignore: modules left alone, in the same words.
        split: take fused projections as several matrices, called as parts of their modules, e.g.
            ``qkv_proj.q``; if not, as one each. A module's name chooses all its parts.

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
    ends = _Ends.of(model)
    shares = expert_shares(model)
    all_linear = ALL_LINEAR in ([targets] if isinstance(targets, str | type) else targets)
    layouts = fused_layouts(model) if split else {}
    claimed: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Matrix):
            continue
        if ignore and _matches(name, module, ignore, ends):
            selection.unwanted[name] = IGNORED
            continue
        whole, layout = _matches(name, module, targets, ends), layouts.get(name)
        parts = [] if layout is None else [f"{name}.{part}" for part in layout.parts]
        chosen = {part for part in parts if whole or _is_named(part, targets)}
        ignored = {part for part in chosen if ignore and _is_named(part, ignore)}
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
        t for t in droppable(model) if _names(targets, t) and not (ignore and _names(ignore, t))
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
    """Raise `TargetError` if a matrix is chosen of some experts of a module, and not of others."""
    for name, count, total in incomplete(model, [t.module for t in selection.targets]):
        raise TargetError(
            f"{count} of {total} experts are chosen for {name}; the experts of a module are "
            f"compressed together: name {name} in targets= or ignore=, or none of it"
        )


def check_selectors(**given: Any) -> None:
    """Raise `TargetError` unless each is a word, a class, or a collection of these.

    Example:
        >>> check_selectors(targets=["q_proj"], ignore="lm_head")
    """
    for argument, value in given.items():
        words = [value] if isinstance(value, str | type) else value
        plain = isinstance(words, Collection) and not isinstance(words, bytes | Mapping | Tensor)
        if not plain or not all(isinstance(word, str | type) for word in words):
            raise TargetError(
                f"{argument}={value!r}; allowed: a word such as 'all-linear', a regular "
                "expression, a module class, or a list of names, words and classes"
            )


def _check_ignored(
    model: nn.Module, ignore: Selector, ends: _Ends, layouts: Mapping[str, Layout]
) -> None:
    """Raise `TargetError` if ``ignore`` matches nothing: it is probably a slip."""
    matrices = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Matrix)
    ]
    parts = [f"{name}.{part}" for name, layout in layouts.items() for part in layout.parts]
    if not any(_matches(name, module, ignore, ends) for name, module in matrices) and not any(
        _is_named(part, ignore) for part in parts
    ):
        endings = {name.rpartition(".")[2] for name, _ in matrices}
        hint = did_you_mean(str(ignore), endings)
        raise TargetError(f"ignore={ignore!r} matches no matrix{hint}", argument="ignore")


def _uses(model: nn.Module) -> dict[int, list[str]]:
    """Return, for every weight, the modules that hold it."""
    uses: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            uses.setdefault(_weight_id(module), []).append(name)
    return uses


def _weight_id(module: nn.Module) -> int:
    """Name a weight; one that is computed anew whenever it is read is its module's own."""
    weight = module._parameters.get("weight")
    return id(module if weight is None else weight)


@dataclass(frozen=True)
class _Ends:
    """Where tokens enter a model, where they leave it, and what stands in its blocks between."""

    table: nn.Module | None
    head: nn.Module | None
    blocks: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Ends:
        return cls(input_table(model), output_head(model), in_blocks(model), aliases(model))

    def names(self, name: str) -> tuple[str, ...]:
        """Return all names of a module: one of an expert has those of all experts as well."""
        return name, *self.aliases.get(name, ())

    def is_around(self, name: str, module: nn.Module) -> bool:
        """Tell whether a linear weight stands beside the blocks, and is not the output head."""
        linear = _is_linear(module) and module is not self.head
        return linear and bool(self.blocks) and name not in self.blocks


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Matrix) and not isinstance(module, nn.Embedding)


def _matches(name: str, module: nn.Module, wanted: Selector, ends: _Ends) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    if isinstance(wanted, str):
        if wanted == ALL_LINEAR:
            linear = _is_linear(module) and module is not ends.head
            return linear and not ends.is_around(name, module)
        if wanted == EMBEDDINGS:
            return isinstance(module, nn.Embedding)
        if wanted == TOKEN_EMBEDDINGS:
            return isinstance(module, nn.Embedding) and module is ends.table
        if wanted == ODD_BLOCKS:
            linear = not isinstance(module, nn.Embedding)
            return linear and (block_of(name) or 0) % 2 == 1
        return any(_fits(wanted, each) for each in ends.names(name))
    return any(
        isinstance(module, word)
        if isinstance(word, type)
        else (word in WORDS and _matches(name, module, word, ends))
        or any(each == word or each.endswith("." + word) for each in ends.names(name))
        for word in wanted
    )


def _names(wanted: Selector, target: Member) -> bool:
    """Tell whether the experts of a block are named, by a word, a name or a pattern."""
    words = [wanted] if isinstance(wanted, str | type) else wanted
    if isinstance(wanted, str) and wanted not in WORDS:
        return _fits(wanted, target.module)
    names = [word for word in words if isinstance(word, str)]
    return EXPERTS in names or any(
        target.module == name or target.module.endswith(f".{name}") for name in names
    )


def _is_named(part: str, wanted: Selector) -> bool:
    """Tell whether a part of a fused module is chosen by its own name."""
    if isinstance(wanted, type):
        return False
    if isinstance(wanted, str):
        return wanted not in WORDS and _fits(wanted, part)
    return any(
        isinstance(word, str) and (part == word or part.endswith("." + word)) for word in wanted
    )


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise TargetError(
            f"{pattern!r} is not a regular expression: {error}; to name modules, use a list"
        ) from error


def _describe(
    name: str, module: Matrix, users: list[str], model: nn.Module, layout: Layout | None
) -> Sequence[Member] | str:
    """Return the matrices that a module holds, or why it is left alone."""
    modules = [model.get_submodule(user) for user in users]
    if any(getattr(other, "_hf_hook", None) for other in modules):
        return "its weight is offloaded by accelerate; compress before dispatching"
    for user, other in zip(users, modules, strict=True):
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
    """Return the 3-D parameters, as those of experts, and why they are left."""
    return {
        f"{name}.{part}": _why_stacked(module)
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")  # kernels of convolutions
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }


def _why_stacked(module: nn.Module) -> str:
    """Return why a module's 3-D parameters are no matrices."""
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
    """Return which modules hold most parameters that are in no linear module or embedding."""
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, Matrix):
            own = (p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
            sizes[type(module).__name__] += sum(own)
    kinds = [kind for kind, size in sizes.most_common(2) if size]
    return f"; most parameters are in {' and '.join(kinds)}, not linear modules" if kinds else ""
