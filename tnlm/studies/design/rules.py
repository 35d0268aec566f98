"""Rules that prune a design space, and the sets of layers that they allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnlm.errors import OptionError, did_you_mean
from tnlm.utils.checks import check_whole

KINDS = {"avoid": "layers", "spacing": "value", "at-most": "value", "all-tensors": None}
"""The argument that each kind of rule takes."""


@dataclass(frozen=True)
class Rule:
    """A rule that every configuration must keep.

    Attributes:
        kind: ``"avoid"``: ``layers`` stay dense; ``"spacing"``: chosen layers are at least
            ``value`` apart; ``"at-most"``: at most ``value`` layers are chosen; or
            ``"all-tensors"``: all matrices of a chosen layer are decomposed.
        layers: layer indices, negative ones counted from the end; for ``"avoid"``.
        value: a whole number of at least 1; for ``"spacing"`` and ``"at-most"``.

    Raises:
        OptionError: if the kind is unknown, or an argument is missing, superfluous or invalid.

    Example:
        >>> Rule("avoid", layers=(0, 1)).to_dict()
        {'kind': 'avoid', 'layers': [0, 1]}
    """

    kind: str
    layers: tuple[int, ...] = ()
    value: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"unknown rule {self.kind!r}{did_you_mean(self.kind, KINDS)}")
        takes = KINDS[self.kind]
        given = {"layers": bool(self.layers), "value": self.value is not None}
        for name, there in given.items():
            if there != (name == takes):
                raise OptionError(
                    f"rule {self.kind!r} with layers={self.layers}, value={self.value}; "
                    f"it takes {takes or 'neither'}"
                )
        if self.value is not None:
            check_whole(f"rule {self.kind!r} with value", self.value)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values, without arguments that it does not take."""
        values = {"layers": list(self.layers), "value": self.value}
        return {"kind": self.kind} | {k: v for k, v in values.items() if k == KINDS[self.kind]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rule:
        """Return the rule that :meth:`to_dict` wrote.

        Raises:
            OptionError: if the values do not describe a rule.
        """
        try:
            return cls(**{**values, "layers": tuple(values.get("layers", ()))})
        except TypeError as error:
            raise OptionError(f"{dict(values)} is not a rule: {error}") from error


INSIGHTS = (
    Rule("avoid", layers=(0, 1, -1)),
    Rule("spacing", value=2),
    Rule("all-tensors"),
)
"""The advice of Moar et al. 2024 (arXiv 2405.06626), in our words: spare the first two layers and
the last, do not choose neighbouring layers, and decompose every matrix of a chosen layer. Their own
9 % schedule breaks the first rule, as it includes layer 31 of 32."""


@dataclass(frozen=True)
class LayerSets:
    """The sets of layers that the rules allow.

    Args:
        layers: the layers that may be chosen, in ascending order.
        spacing: the smallest distance between two chosen layers.
        most: how many layers may be chosen.

    Example:
        >>> sets = LayerSets((2, 3, 4), spacing=2, most=3)
        >>> list(sets), sets.count  # the count includes the empty set
        ([(2,), (3,), (4,), (2, 4)], 5)
    """

    layers: tuple[int, ...]
    spacing: int
    most: int

    @classmethod
    def under(cls, rules: Sequence[Rule], layers: Sequence[int], depth: int) -> LayerSets:
        """Return the sets that rules allow in a model with ``depth`` layers.

        Raises:
            OptionError: if a rule names a layer that the model does not have.
        """
        avoided: set[int] = set()
        for rule in rules:
            for layer in rule.layers:
                if not -depth <= layer < depth:
                    raise OptionError(
                        f"rule 'avoid' names layer {layer}; allowed: {-depth} to {depth - 1}"
                    )
                avoided.add(layer % depth)
        left = tuple(layer for layer in layers if layer not in avoided)
        return cls(
            left,
            max((r.value for r in rules if r.kind == "spacing" and r.value), default=1),
            min((r.value for r in rules if r.kind == "at-most" and r.value), default=len(left)),
        )

    @property
    def count(self) -> int:
        """How many sets there are, including the empty one."""
        ways, total = [1] * len(self.layers), 1
        for _ in range(min(self.most, len(self.layers))):
            total += sum(ways)  # sets of this size, by their last layer
            ways = [
                sum(
                    way
                    for way, before in zip(ways, self.layers, strict=True)
                    if layer - before >= self.spacing
                )
                for layer in self.layers
            ]
        return total

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield every set except the empty one, in order of size."""
        for size in range(1, min(self.most, len(self.layers)) + 1):
            yield from self._of_size(size, 0)

    def _of_size(self, size: int, start: int) -> Iterator[tuple[int, ...]]:
        for index in range(start, len(self.layers)):
            first = self.layers[index]
            if size == 1:
                yield (first,)
                continue
            after = index + 1
            while after < len(self.layers) and self.layers[after] - first < self.spacing:
                after += 1
            for rest in self._of_size(size - 1, after):
                yield (first, *rest)

    def thin(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Return chosen layers without those that break a rule; earlier layers take priority."""
        kept: list[int] = []
        for layer in sorted(set(chosen) & set(self.layers)):
            if len(kept) < self.most and (not kept or layer - kept[-1] >= self.spacing):
                kept.append(layer)
        return tuple(kept)
