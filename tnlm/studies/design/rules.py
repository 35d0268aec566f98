"""Rules that prune a design space, held as data, and the sets of layers that they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnlm.errors import OptionError, did_you_mean

KINDS = {"avoid": "layers", "spacing": "value", "at-most": "value", "all-tensors": None}
"""What each kind of rule takes besides its name."""


@dataclass(frozen=True)
class Rule:
    """One rule that a configuration must keep.

    Attributes:
        kind: ``"avoid"``, ``layers`` stay dense; ``"spacing"``, chosen layers are at least
            ``value`` apart; ``"at-most"``, so many layers are chosen; or ``"all-tensors"``, all
            matrices of a chosen layer are decomposed.
        layers: numbers of layers, negative ones from the end; for ``"avoid"``.
        value: a number of at least 1; for ``"spacing"`` and ``"at-most"``.

    Raises:
        OptionError: for an unknown kind, or what the kind does not take.

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
        if self.value is not None and self.value < 1:
            raise OptionError(f"rule {self.kind!r} with value={self.value}; allowed: at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values, without what it does not take."""
        takes = KINDS[self.kind]
        found: dict[str, Any] = {"kind": self.kind}
        if takes == "layers":
            found["layers"] = list(self.layers)
        elif takes == "value":
            found["value"] = self.value
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rule:
        """Return the rule that :meth:`to_dict` wrote.

        Raises:
            OptionError: if the values are not those of a rule.
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
"""What Moar et al. 2024 (arXiv 2405.06626) advise, in our words: spare the first two layers and the
last, spread the others out, and decompose every matrix of a layer. Their own 9 % schedule breaks
the first rule with layer 31 of 32."""


@dataclass(frozen=True)
class LayerSets:
    """The sets of layers that rules allow.

    Args:
        layers: the layers that may be chosen, in order.
        spacing: the least distance of two chosen ones.
        most: how many may be chosen.

    Example:
        >>> sets = LayerSets((2, 3, 4), spacing=2, most=3)
        >>> list(sets), sets.count  # the empty set counts, too
        ([(2,), (3,), (4,), (2, 4)], 5)
    """

    layers: tuple[int, ...]
    spacing: int
    most: int

    @classmethod
    def under(cls, rules: Sequence[Rule], layers: Sequence[int], depth: int) -> LayerSets:
        """Return the sets that rules leave of some layers of a model with ``depth`` of them.

        Raises:
            OptionError: if a rule names a layer that the model has not.
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
        """How many sets there are, the empty one included."""
        ways, total = [1] * len(self.layers), 1
        for _ in range(min(self.most, len(self.layers))):
            total += sum(ways)  # ways to choose so many layers, by the last one
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
        """Yield every set but the empty one, the small ones first."""
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
        """Return the chosen layers that may stay, where the earlier of two goes first."""
        kept: list[int] = []
        for layer in sorted(set(chosen) & set(self.layers)):
            if len(kept) < self.most and (not kept or layer - kept[-1] >= self.spacing):
                kept.append(layer)
        return tuple(kept)
