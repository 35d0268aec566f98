"""Finds feed-forward layers by running modules, independent of names and classes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.targets.probe import Finding, probe
from tnlm.targets.signature import signature
from tnlm.targets.stubs import Linear, widths
from tnlm.targets.trial import Hidden
from tnlm.utils.residency import resident


@dataclass(frozen=True)
class Layer:
    """The matrices that produce hidden channels, and the one that reads them.

    Attributes:
        parent: name of the module that holds them.
        hidden: the channels, with the matrices named within the parent.
        gates: for every producer of gates and values, whether a channel's gate comes first.
        reason: why its channels cannot be removed, or None.
    """

    parent: str
    hidden: Hidden
    gates: tuple[tuple[str, bool], ...] = ()
    reason: str | None = None

    @property
    def producers(self) -> list[str]:
        """Names of the matrices that produce the channels."""
        return [f"{self.parent}.{name}".lstrip(".") for name in self.hidden.producers]

    @property
    def reader(self) -> str:
        """Name of the matrix that reads them."""
        return f"{self.parent}.{self.hidden.reader}".lstrip(".")


def feed_forward_layers(model: nn.Module) -> list[Layer]:
    """Return the feed-forward layers of a model, and try which of them can lose channels.

    Any linear module may read hidden channels, from siblings or from elsewhere in the enclosing
    module, as in BERT. Of layers with the same classes and shapes, only one is tried.

    Args:
        model: run in parts, on copies without its matrices; left unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...     num_attention_heads=2))
        >>> [layer] = feed_forward_layers(model)
        >>> layer.producers, layer.reader
        (['layers.0.mlp.gate_proj', 'layers.0.mlp.up_proj'], 'layers.0.mlp.down_proj')
    """
    finder = _Finder(model)
    linear = {n: widths(m) for n, m in model.named_modules() if isinstance(m, Linear) and _plain(m)}
    order = sorted(linear, key=lambda name: linear[name][1] <= linear[name][0])
    for reader in order:  # those with more inputs than outputs come first
        finder.look(reader, linear)
    place = {name: number for number, name in enumerate(linear)}
    return sorted(finder.layers, key=lambda layer: place[layer.reader])


class _Finder:
    """Tries matrices as readers, one after another, and stores the layers found."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kinds: dict[str, Hashable] = {}
        self._known: dict[Hashable, Finding] = {}
        self._taken: set[str] = set()
        self.layers: list[Layer] = []

    def look(self, reader: str, linear: Mapping[str, tuple[int, int]]) -> None:
        """Try a matrix as a reader, unless it already belongs to a layer."""
        for parent, names in self._around(reader, linear):
            if reader in self._taken:
                return
            finding = self._probe(parent, reader, names)
            if finding.hidden is not None:
                layer = Layer(parent, finding.hidden, finding.gates, finding.reason)
                self.layers.append(layer)
                self._taken.update([*layer.producers, reader])

    def _around(
        self, reader: str, linear: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[str, list[str]]]:
        """Yield the callable modules around a reader, with the possible producers in each."""
        rows, width = linear[reader]
        parent = reader.rpartition(".")[0]
        beyond = parent.rpartition(".")[0]
        free = [n for n in linear if n not in self._taken and linear[n][0] in (width, 2 * width)]
        if _is_callable(self._model.get_submodule(parent)):
            yield parent, [name for name in free if _is_in(name, parent) and name != reader]
        if parent and _is_callable(self._model.get_submodule(beyond)):
            apart = [name for name in free if _is_in(name, beyond) and not _is_in(name, parent)]
            yield beyond, [name for name in apart if linear[name][1] == rows]

    def _probe(self, parent: str, reader: str, names: Sequence[str]) -> Finding:
        """Return the result of a trial, or that of an earlier trial of the same kind."""
        if not names:
            return Finding()
        if parent not in self._kinds:
            self._kinds[parent] = signature(self._model.get_submodule(parent))
        cut = len(parent) + 1 if parent else 0
        inside = tuple(name[cut:] for name in names)
        key = self._kinds[parent], reader[cut:], inside
        if key not in self._known:
            layer = self._model.get_submodule(parent)
            with resident(self._model, parent):
                self._known[key] = probe(layer, reader[cut:], inside)
        return self._known[key]


def _is_in(name: str, parent: str) -> bool:
    return not parent or name.startswith(parent + ".")


def _plain(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point()


def _is_callable(module: nn.Module) -> bool:
    """Return whether a module can be called with hidden states, unlike lists and models.

    A module dispatched by accelerate cannot, since its forward calls the original, not the copy.
    """
    has_forward = type(module).forward is not nn.Module.forward
    dispatched = hasattr(module, "_hf_hook")
    return has_forward and not dispatched and not isinstance(module, PreTrainedModel)
