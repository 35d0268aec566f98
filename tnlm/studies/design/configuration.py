"""One point of a design space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tnlm.errors import OptionError


@dataclass(frozen=True)
class Configuration:
    """The layers and matrices that are decomposed, at one rank, in one format.

    Attributes:
        layers: numbers of the layers, in order; none for the dense model.
        tensors: names of the matrices in each of them, as the space calls them.
        rank: the rank of every matrix.
        format: ``"tucker"`` or ``"low-rank"``.

    Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626.

    Example:
        >>> print(Configuration((2, 29), ("q_proj", "k_proj")))
        layers 2 29: q_proj k_proj, tucker of rank 1
        >>> print(Configuration())
        dense
    """

    layers: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    rank: int = 1
    format: str = "tucker"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is decomposed."""
        return not (self.layers and self.tensors)

    @property
    def key(self) -> str:
        """A text that no other configuration has; all dense ones share theirs."""
        return json.dumps(asdict(Configuration() if self.is_dense else self), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return {**asdict(self), "layers": list(self.layers), "tensors": list(self.tensors)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Configuration:
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            OptionError: if the values are not those of a configuration.
        """
        try:
            lists = {name: tuple(values[name]) for name in ("layers", "tensors")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise OptionError(f"{dict(values)} is not a configuration: {error}") from error

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        layers, tensors = " ".join(map(str, self.layers)), " ".join(self.tensors)
        return f"layers {layers}: {tensors}, {self.format} of rank {self.rank}"


DENSE = Configuration()
