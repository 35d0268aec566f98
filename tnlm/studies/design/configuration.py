"""One point of a design space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tnlm.errors import OptionError


@dataclass(frozen=True)
class Configuration:
    """Which layers and matrices are decomposed, at which rank and in which format.

    Attributes:
        layers: indices of the layers, in ascending order; empty for the dense model.
        tensors: names of the matrices in each layer, as in the space.
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
        """A unique text; all configurations that decompose nothing share one."""
        return json.dumps(asdict(Configuration() if self.is_dense else self), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return {**asdict(self), "layers": list(self.layers), "tensors": list(self.tensors)}

    def row(self) -> dict[str, Any]:
        """Return the configuration as the cells of a table."""
        return {
            "layers": " ".join(map(str, self.layers)),
            "tensors": " ".join(self.tensors),
            "rank": None if self.is_dense else self.rank,
            "format": None if self.is_dense else self.format,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Configuration:
        """Return the configuration that :meth:`to_dict` wrote.

        Raises:
            OptionError: if the values do not describe a configuration.
        """
        try:
            lists = {name: tuple(values[name]) for name in ("layers", "tensors")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise OptionError(f"{dict(values)} is not a configuration: {error}") from error

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        return "layers {layers}: {tensors}, {format} of rank {rank}".format(**self.row())


DENSE = Configuration()
