"""The interface of kinds of entries, and the base of those for matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import CheckpointError
from tnlm.layers.shapes import shape_of
from tnlm.precision.grid import Precision
from tnlm.tensors.network import Network

if TYPE_CHECKING:  # whose import imports the plug-in, and that this file
    from transformers import PreTrainedModel

Entry = dict[str, Any]
"""A checkpoint's description of one module, in plain values."""


@dataclass(frozen=True)
class Place:
    """Where a built module will stand.

    Attributes:
        device: of its tensors; the default one if None.
        dtype: of its tensors; the default one if None.
        old: the module that it replaces, dense or built before: what an entry does not say, such as
            an activation, comes from it.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    old: nn.Module | None = None

    @property
    def tensors(self) -> dict[str, Any]:
        """Device and dtype, as keywords."""
        return {"device": self.device, "dtype": self.dtype}

    def empty(self, *shape: int) -> torch.Tensor:
        """Return an uninitialised tensor there."""
        return torch.empty(*shape, **self.tensors)


class EntryKind(ABC):
    """One kind of entry: how it is checked, built and made dense again.

    Attributes:
        name: the entry's ``"kind"``.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, entry: Entry, module: nn.Module) -> None:
        """Raise `CheckpointError` unless an entry fits the module it replaces.

        Shapes must match the model's, so that no entry can ask for more memory than the dense
        model. Lookup, type and value errors count as a broken entry.
        """

    @abstractmethod
    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return the (uninitialised) module that an entry describes.

        Args:
            entry: checked.
            place: where it will stand.
        """

    @abstractmethod
    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return an ordinary dense module with the weights of a built one."""

    def small(self, entry: Entry, module: Any) -> nn.Module:
        """Return an ordinary module with these weights, without the channels that were dropped."""
        return self.dense(entry, module)

    def link(self, model: PreTrainedModel, module: nn.Module) -> None:  # noqa: B027
        """Let a module that stands in a model find others that it reads."""

    def before_dense(  # noqa: B027 - most kinds have nothing to change
        self, model: PreTrainedModel, entries: Mapping[str, Entry]
    ) -> None:
        """Change what the whole model says of modules of this kind before they are made dense.

        Args:
            model: still compressed.
            entries: all that are of this kind, by the names of their modules; at least one.

        Raises:
            ModelError: if the model's class has no place for what they are.
        """


class MatrixKind(EntryKind):
    """An entry of a module whose weight is a matrix.

    Attributes:
        table: whether it replaces an embedding.
        partial: whether it may be one of several parts of a module.
    """

    table: ClassVar[bool] = False
    partial: ClassVar[bool] = False

    def check(self, entry: Entry, module: nn.Module) -> None:
        """Check the type, the shape and the bias against those of the module."""
        if isinstance(module, nn.Embedding) != self.table:
            raise CheckpointError(f"kind={self.name!r}, but the model has {type(module).__name__}")
        if bool(entry.get("conv1d")) != isinstance(module, Conv1D):
            raise CheckpointError(
                f"conv1d={entry.get('conv1d')!r}, but the model has {type(module).__name__}"
            )
        shape = self.shape(entry)
        if shape != shape_of(module):
            raise CheckpointError(f"it is {by(shape)}, but the model has {by(shape_of(module))}")
        self.check_part(entry, getattr(module, "bias", None) is not None)

    def shape(self, entry: Entry) -> tuple[int, int]:
        """Return the ``(out, in)`` shape of the replaced matrix."""
        return sizes(entry["shape"])

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Raise `CheckpointError` unless an entry is valid, as a whole module or as a part."""
        added = entry.get("bias_added") is True and not biased
        if entry["bias"] is not (biased or added):
            has = "a" if biased else "no"
            raise CheckpointError(f"bias={entry['bias']!r}, but the model has {has} bias there")

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return a linear layer with the module's dense weight."""
        return plain(entry, module.to_dense().detach(), module.bias, trained(module))


def grids(entry: Mapping[str, Any], before: str = "") -> dict[str, Precision]:
    """Return the precision of every packed layer in the module of an entry, by its name there.

    Raises:
        OptionError: if a precision is invalid.

    Example:
        >>> grids({"kind": "dense", "precision": {"": {"bits": 4}}})
        {'': Precision(bits=4, group=64, symmetric=True)}
    """
    own = entry.get("precision", {}).items()
    found = {f"{before}{name}".rstrip("."): Precision(**values) for name, values in own}
    for part in entry.get("parts", ()):
        found |= grids(part, f"{before}{part['name']}.")
    return found


def network_of(entry: Mapping[str, Any]) -> Network:
    """Return the network that an entry describes.

    Raises:
        TnlmError: if the format or an option is unknown, or the spec does not fit the shape.
    """
    structure = get_format(entry["format"])
    rows, columns = entry["shape"]
    return structure.network((rows, columns), from_dict(structure.spec, entry["options"]))


def check_network(entry: Entry, wanted: str) -> None:
    """Raise `CheckpointError` unless the format can replace a module, and with fewer parameters."""
    structure = get_format(entry["format"])
    if wanted not in structure.kinds | structure.made_of:
        raise CheckpointError(f"{entry['format']} cannot replace a {wanted} module")
    network = network_of(entry)
    if network.shape != tuple(entry["shape"]):
        raise CheckpointError(f"{entry['options']} is no {by(sizes(entry['shape']))} matrix")
    if entry.get("shared") is True:  # several blocks share factors, which count once
        return
    if network.params > network.shape[0] * network.shape[1]:
        raise CheckpointError(f"{entry['options']} is larger than the dense matrix")


def plain(entry: Entry, weight: torch.Tensor, bias: nn.Parameter | None, learns: bool) -> nn.Module:
    """Return an ordinary linear layer, or a Conv1D if the model had one."""
    rows, columns = weight.shape
    if entry.get("conv1d"):
        dense: nn.Module = Conv1D(rows, columns)
        weight = weight.T
    else:
        dense = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=learns)
    if bias is not None:
        dense.bias = bias
    return dense


def trained(module: nn.Module) -> bool:
    """Return whether any parameter of a module, other than a bias, is trainable."""
    return any(
        p.requires_grad for name, p in module.named_parameters() if not name.endswith("bias")
    )


def sizes(given: Sequence[Any]) -> tuple[int, int]:
    """Check that a file's shape has two sizes, and return them."""
    if len(given) != 2 or not all(type(size) is int and size >= 1 for size in given):
        raise CheckpointError(f"shape={given!r}; allowed: two whole numbers >= 1")
    rows, columns = given
    return rows, columns


def by(shape: tuple[int, int]) -> str:
    """Return a shape as text."""
    return f"{shape[0]}x{shape[1]}"
