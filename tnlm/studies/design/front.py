"""The Pareto front of a design space, as a table, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tnlm.errors import OptionError
from tnlm.studies.design.configuration import Configuration
from tnlm.studies.table import as_csv
from tnlm.utils.files import save_text
from tnlm.utils.pareto import pareto

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Point:
    """A configuration with the values of its objectives.

    Attributes:
        configuration: what is decomposed.
        percent: percentage of the model's parameters that is removed, as stored.
        values: objective values by name.
    """

    configuration: Configuration
    percent: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """The result of a search.

    Attributes:
        objectives: their names, in order.
        maximize: the names of those of which higher is better.
        points: the Pareto front, in order of the percentage removed.
        dense: the dense model, which is on the front only if nothing dominates it.
        measured: how many configurations were measured.
        failed: the reasons why configurations failed, by configuration.
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
        """Return the front of all measured points."""
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
        """Return one flat row per point of the front."""
        return [
            {**point.configuration.row(), "percent": point.percent, **point.values}
            for point in self.points
        ]

    def to_csv(self) -> str:
        """Return the rows as CSV text."""
        return as_csv(self.rows())

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Return the front that :meth:`to_json` wrote.

        Raises:
            OptionError: if the text is not a front.
        """
        try:
            data = json.loads(text)
            if data.pop("format_version") != FORMAT_VERSION:
                raise OptionError(f"the front does not have format_version {FORMAT_VERSION}")
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
        """Write the front as CSV if the file name ends in ``.csv``, and as JSON otherwise.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        save_text(path, self.to_csv() if Path(path).suffix == ".csv" else self.to_json())

    def __str__(self) -> str:
        lines = [f"{len(self.points)} of {self.measured} configurations are on the front"]
        for point in self.points:
            values = ", ".join(f"{name} {value:.5g}" for name, value in point.values.items())
            lines.append(f"{point.percent:6.2f} %  {values}  {point.configuration}")
        if self.failed:
            lines.append(f"failed: {len(self.failed)}, e.g. {next(iter(self.failed.values()))}")
        return "\n".join(lines)


def _from_dict(values: Mapping[str, Any]) -> Point:
    made = Configuration.from_dict(values["configuration"])
    return Point(made, float(values["percent"]), dict(values["values"]))
