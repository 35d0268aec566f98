"""The Pareto front: the points that no other point beats in everything."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnlm.errors import CheckpointError, EvaluationError, OptionError
from tnlm.studies.design.configuration import Configuration
from tnlm.studies.design.sweep import as_csv

FORMAT_VERSION = 1


def pareto(values: Sequence[Sequence[float]], maximize: Sequence[bool]) -> list[int]:
    """Return which points no other point dominates.

    A point dominates another if it is as good in every objective and better in one. Points that are
    equal do not dominate each other: all of them stay.

    Args:
        values: one sequence of objective values a point.
        maximize: for every objective, whether more is better.

    Returns:
        The indices of the front, in order.

    Raises:
        OptionError: if a point has another number of values.
        EvaluationError: if a value is NaN, which has no order.

    Example:
        >>> pareto([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0)], [False, False])
        [0, 1]
    """
    costs = []
    for index, point in enumerate(values):
        if len(point) != len(maximize):
            raise OptionError(f"point {index} has {len(point)} values for {len(maximize)} goals")
        if any(value != value for value in point):
            raise EvaluationError(f"point {index} has a value that is not a number: {list(point)}")
        signed = zip(point, maximize, strict=True)
        costs.append(tuple(-value if more else value for value, more in signed))
    # In this order a point can be dominated only by one before it.
    front: list[tuple[float, ...]] = []
    for cost in sorted(set(costs)):
        if not any(_at_least_as_good(other, cost) for other in front):
            front.append(cost)
    kept = set(front)
    return [index for index, cost in enumerate(costs) if cost in kept]


def _at_least_as_good(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Point:
    """A configuration with the values of the objectives.

    Attributes:
        configuration: what is decomposed.
        percent: of the model's parameters, what is removed as stored.
        values: by the names of the objectives.
    """

    configuration: Configuration
    percent: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """What a search found.

    Attributes:
        objectives: their names, in order.
        maximize: the names of those of which more is better.
        points: the Pareto front, from little removed to much.
        dense: the dense model, which is on the front only if nothing beats it.
        measured: how many configurations were measured.
        failed: why configurations failed, those whose metric did.
    """

    objectives: tuple[str, ...]
    maximize: tuple[str, ...]
    points: tuple[Point, ...]
    dense: Point
    measured: int
    failed: Mapping[str, str]

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        dense: Point,
        maximize: Collection[str],
        failed: Mapping[str, str],
    ) -> Front:
        """Return the front of all points measured."""
        names = tuple(dense.values)
        table = [[point.values[name] for name in names] for point in points]
        best = [points[index] for index in pareto(table, [name in maximize for name in names])]
        return cls(
            names,
            tuple(name for name in names if name in maximize),
            tuple(sorted(best, key=lambda point: (point.percent, point.configuration.key))),
            dense,
            len(points),
            dict(failed),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a point of the front."""
        return [
            {
                "layers": " ".join(map(str, point.configuration.layers)),
                "tensors": " ".join(point.configuration.tensors),
                "rank": None if point.configuration.is_dense else point.configuration.rank,
                "format": None if point.configuration.is_dense else point.configuration.format,
                "percent": point.percent,
                **point.values,
            }
            for point in self.points
        ]

    def to_csv(self) -> str:
        """Return the points of the front as CSV text."""
        return as_csv(self.rows())

    def to_json(self) -> str:
        """Return the whole as JSON text."""
        values = {
            "format_version": FORMAT_VERSION,
            "objectives": list(self.objectives),
            "maximize": list(self.maximize),
            "points": [_to_dict(point) for point in self.points],
            "dense": _to_dict(self.dense),
            "measured": self.measured,
            "failed": dict(self.failed),
        }
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Return the front that :meth:`to_json` wrote.

        Raises:
            OptionError: if the text is not such a front.
        """
        try:
            data = json.loads(text)
            if data.pop("format_version") != FORMAT_VERSION:
                raise OptionError(f"this front is not of format_version {FORMAT_VERSION}")
            return cls(
                tuple(data["objectives"]),
                tuple(data["maximize"]),
                tuple(_from_dict(point) for point in data["points"]),
                _from_dict(data["dense"]),
                int(data["measured"]),
                dict(data["failed"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"not a tnlm front: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the front: as CSV if the name ends so, else as JSON.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        text = self.to_csv() if Path(path).suffix == ".csv" else self.to_json()
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    def __str__(self) -> str:
        lines = [f"{len(self.points)} of {self.measured} configurations are on the front"]
        for point in self.points:
            values = ", ".join(f"{name} {value:.5g}" for name, value in point.values.items())
            lines.append(f"{point.percent:6.2f} %  {values}  {point.configuration}")
        if self.failed:
            lines.append(f"failed: {len(self.failed)}, e.g. {next(iter(self.failed.values()))}")
        return "\n".join(lines)


def _to_dict(point: Point) -> dict[str, Any]:
    return {
        "configuration": point.configuration.to_dict(),
        "percent": point.percent,
        "values": dict(point.values),
    }


def _from_dict(values: Mapping[str, Any]) -> Point:
    made = Configuration.from_dict(values["configuration"])
    return Point(made, float(values["percent"]), dict(values["values"]))
