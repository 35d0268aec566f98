"""The matrices of a model by layer and by name within the layer, without their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.checks import check_model
from tnlm.errors import OptionError, TargetError, did_you_mean
from tnlm.network import Cost
from tnlm.scratch import skeleton
from tnlm.targets import ALL_LINEAR, Selector, Target, select

NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Matrices:
    """What a design space must know of a model.

    Attributes:
        layers: tensor name to target, for every layer.
        cost: of the whole dense model.
        itemsize: bytes of one number.
    """

    layers: Mapping[int, Mapping[str, Target]]
    cost: Cost
    itemsize: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the matrices of a layer, in the model's order."""
        return tuple(dict.fromkeys(name for layer in self.layers.values() for name in layer))


def matrices(
    source: PreTrainedModel | PreTrainedConfig, targets: Selector = ALL_LINEAR
) -> Matrices:
    """Return the matrices of a model, or of what a config would make; no weights are made.

    Args:
        source: a model, which is not changed, or a config.
        targets: the matrices meant; those outside a numbered layer are passed over.

    Returns:
        The matrices; each is named by the last word of its name where that is clear, and by all
        that follows the layer's number where it is not.

    Raises:
        ModelError: for what is neither, or a model that is compressed already.
        TargetError: if no target is in a numbered layer, or several stacks of layers have some.

    Example:
        >>> from transformers import LlamaConfig
        >>> found = matrices(LlamaConfig())  # that of Llama-2-7B
        >>> len(found.layers), found.cost.params, found.names[4:]
        (32, 6738415616, ('gate_proj', 'up_proj', 'down_proj'))
    """
    if isinstance(source, PreTrainedModel):
        check_model(source)
        model = source
    else:
        model = skeleton(source, None, None)
    found: dict[int, dict[str, Target]] = {}
    stacks: dict[str, None] = {}
    for target in select(model, targets).targets:
        match = NUMBERED.fullmatch(target.name)
        if match and target.kind == "linear":
            stack, number, path = match.groups()
            stacks[stack] = None
            found.setdefault(int(number), {})[path] = target
    if len(stacks) != 1:
        names = ", ".join(stacks) or "none"
        raise TargetError(
            f"a design space is of one stack of layers; targets={targets!r} are in: {names}"
        )
    short = _short_names(found)
    named = {n: {short[path]: t for path, t in found[n].items()} for n in sorted(found)}
    first = next(iter(next(iter(named.values())).values()))
    return Matrices(named, model_cost(model), first.weight(model).element_size())


def _short_names(layers: Mapping[int, Mapping[str, Target]]) -> dict[str, str]:
    """Return the last word of every path, or the path where two paths end alike."""
    paths = dict.fromkeys(path for layer in layers.values() for path in layer)
    ends = [path.rpartition(".")[2] for path in paths]
    return {
        path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)
    }


def choices(
    tensors: Sequence[str] | Mapping[str, Sequence[str]] | None, names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the matrices of every choice that a space offers within a layer.

    Args:
        tensors: names, a mapping from names to what is chosen together, or None for every matrix.
        names: the matrices that there are.

    Raises:
        OptionError: for an unknown matrix, one that stands in two choices, or an empty choice.

    Example:
        >>> choices({"attention": ["q", "k"]}, ["q", "k", "up"])
        {'attention': ('q', 'k')}
    """
    if tensors is None:
        tensors = names
    if isinstance(tensors, str):
        raise OptionError(f"tensors={tensors!r}; allowed: a list of names, or a mapping to lists")
    groups = tensors if isinstance(tensors, Mapping) else {name: [name] for name in tensors}
    found = {name: tuple(members) for name, members in groups.items()}
    members = [member for group in found.values() for member in group]
    for member in members:
        if member not in names:
            raise OptionError(f"unknown tensor {member!r}{did_you_mean(member, names)}")
        if members.count(member) > 1:
            raise OptionError(f"tensor {member!r} stands in several choices of tensors=")
    if not all(found.values()) or not found:
        raise OptionError(f"tensors={tensors!r}; every choice needs a matrix at least")
    return found
