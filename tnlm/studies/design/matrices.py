"""The matrices of a model by layer and by name within the layer, without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.compression.scratch import skeleton
from tnlm.errors import OptionError, TargetError, did_you_mean
from tnlm.targets.base import Selector, Target
from tnlm.targets.checks import check_model
from tnlm.targets.matching import ALL_LINEAR
from tnlm.targets.selection import select
from tnlm.tensors.network import Cost
from tnlm.utils.names import split_at_block


@dataclass(frozen=True)
class Matrices:
    """What a design space needs to know about a model.

    Attributes:
        layers: the targets of each layer, by layer index and then by tensor name.
        cost: cost of the whole dense model.
        itemsize: bytes per parameter.
    """

    layers: Mapping[int, Mapping[str, Target]]
    cost: Cost
    itemsize: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the matrices in a layer, in the model's order."""
        return tuple(dict.fromkeys(name for layer in self.layers.values() for name in layer))


def matrices(
    source: PreTrainedModel | PreTrainedConfig, targets: Selector = ALL_LINEAR
) -> Matrices:
    """Return the matrices of a model or of a config, for which no weights are created.

    Args:
        source: a model, which is left unchanged, or a config.
        targets: which matrices to consider; those outside numbered layers are skipped.

    Returns:
        The matrices. Each is called by the last part of its name if that is unique within a layer,
        and otherwise by everything after the layer's number.

    Raises:
        ModelError: if the source is neither, or is compressed already.
        TargetError: if no target is in a numbered layer, or if targets are in several stacks of
            layers.

    Example:
        >>> from transformers import LlamaConfig
        >>> found = matrices(LlamaConfig())  # the sizes of Llama-2-7B
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
        split = split_at_block(target.name)
        if split is not None and target.kind == "linear":
            stack, number, path = split
            stacks[stack] = None
            found.setdefault(number, {})[path] = target
    if len(stacks) != 1:
        names = ", ".join(stacks) or "none"
        raise TargetError(
            f"a design space needs one stack of layers; targets={targets!r} are in: {names}"
        )
    short = _short_names(found)
    named = {n: {short[path]: t for path, t in found[n].items()} for n in sorted(found)}
    first = next(iter(next(iter(named.values())).values()))
    return Matrices(named, model_cost(model), first.weight(model).element_size())


def _short_names(layers: Mapping[int, Mapping[str, Target]]) -> dict[str, str]:
    """Return the last part of each path, or the whole path where several end alike."""
    paths = dict.fromkeys(path for layer in layers.values() for path in layer)
    ends = [path.rpartition(".")[2] for path in paths]
    return {
        path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)
    }


def choices(
    tensors: Sequence[str] | Mapping[str, Sequence[str]] | None, names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the matrices behind every choice that a space offers within a layer.

    Args:
        tensors: names; or a mapping from names to matrices that are chosen together; or None for
            every matrix alone.
        names: the matrices in a layer.

    Raises:
        OptionError: if a matrix is unknown or in two choices, or a choice is empty.

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
            raise OptionError(f"tensor {member!r} is in several choices of tensors=")
    if not all(found.values()) or not found:
        raise OptionError(f"tensors={tensors!r}; every choice needs at least one matrix")
    return found
