"""The plan of a compression: a decision and a cost for every matrix, before any weight changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tnlm.errors import CheckpointError, OptionError
from tnlm.plans.coverage import Coverage
from tnlm.precision.grid import Precision
from tnlm.tensors.network import Cost
from tnlm.utils.files import save_text
from tnlm.utils.notebook import fragment

FORMAT_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one matrix.

    Attributes:
        name: the target's name.
        kind: ``"linear"`` or ``"embedding"``.
        shape: ``(out, in)``.
        format: the structure that replaces it; None leaves it dense.
        spec: the format's options, plain values.
        before: cost of the dense matrix.
        after: cost of its replacement.
        error: predicted relative error in the metric, if computed.
        note: why the matrix stays dense.
        bias: whether a bias is added to a matrix without one.
        precision: bits, group and symmetry of its codes, plain values; None for the model's dtype.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    format: str | None
    spec: Mapping[str, Any]
    before: Cost
    after: Cost
    error: float | None = None
    note: str = ""
    bias: bool = False
    precision: Mapping[str, Any] | None = None

    @property
    def replaced(self) -> bool:
        """Whether anything takes the matrix's place."""
        return self.format is not None or self.precision is not None

    @property
    def grid(self) -> Precision | None:
        """The grid of its codes, if it is stored in few bits."""
        return None if self.precision is None else Precision(**self.precision)

    @property
    def keep(self) -> float:
        """Fraction of the matrix's parameters that is kept."""
        return self.after.params / self.before.params


@dataclass(frozen=True)
class Plan:
    """Decisions for all matrices of a model; prints as a table and round-trips through JSON.

    Attributes:
        scheme: name of the scheme.
        metric: how errors are measured.
        request: the options given.
        layers: one entry per target, in the model's order.
        model: cost of the whole model before compression.
        skipped: modules that matched but are left alone, with the reason.
        coverage: every parameter of two or more dimensions that is left as it is; None of a plan
            that was written before plans said so.
    """

    scheme: str
    metric: str
    request: Mapping[str, Any]
    layers: tuple[LayerPlan, ...]
    model: Cost
    skipped: Mapping[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None

    @property
    def targets_before(self) -> Cost:
        """Cost of all targets before compression."""
        return total(layer.before for layer in self.layers)

    @property
    def targets_after(self) -> Cost:
        """Cost of all targets as planned."""
        return total(layer.after for layer in self.layers)

    @property
    def model_after(self) -> Cost:
        """Cost of the whole model as planned."""
        before, after = self.targets_before, self.targets_after
        return Cost(
            self.model.params - before.params + after.params,
            self.model.bytes - before.bytes + after.bytes,
            self.model.macs - before.macs + after.macs,
            time=self.model.time and self.model.time - before.time + after.time,
        )

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by :meth:`to_json`.

        Raises:
            OptionError: if the text is not such a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise OptionError(f"not a tnlm plan: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read a plan from the values that :meth:`to_json` writes.

        Raises:
            OptionError: if the values are not those of a plan.
        """
        try:
            data = dict(values)
            if data.pop("format_version") != FORMAT_VERSION:
                raise OptionError(
                    f"this plan does not have format_version {FORMAT_VERSION}; make it again with "
                    "this tnlm"
                )
            layers = tuple(_layer(**layer) for layer in data.pop("layers"))
            covered = Coverage.read(data.pop("coverage", None))
            return cls(layers=layers, model=Cost(**data.pop("model")), coverage=covered, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"not a tnlm plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        save_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text)

    def __str__(self) -> str:
        """Return the plan as a table."""
        return "\n".join([*table(self.layers), *self.left(), *self.summary()])

    def __repr__(self) -> str:
        """Return the scheme and what is kept, in one line."""
        return f"<Plan {self.kept()}>"

    def _repr_html_(self) -> str:
        """Return the totals and the table, for a notebook."""
        rows = [HEADINGS, *map(row, self.layers)]
        return fragment(f"Plan {self.kept()}", self.summary(), rows)

    def kept(self) -> str:
        """Return the scheme and the fraction of parameters that is kept, in one line."""
        part = self.targets_after.params / max(1, self.targets_before.params)
        whole = self.model_after.params / max(1, self.model.params)
        count = f"{len(self.layers)} {'matrix' if len(self.layers) == 1 else 'matrices'}"
        return f"{self.scheme}: {count}, {part:.3f} of their parameters, {whole:.3f} of the model's"

    def left(self) -> list[str]:
        """Return the table of parameters left unchanged; no lines if they are not known."""
        return self.coverage.table() if self.coverage else []

    def summary(self) -> list[str]:
        """Return the totals, one line each."""
        return [
            f"targets: {change(self.targets_before, self.targets_after)}",
            f"model:   {change(self.model, self.model_after)}",
            *self._times(),
            *(f"skipped: {name}: {reason}" for name, reason in self.skipped.items()),
            *([self.coverage.summary()] if self.coverage else []),
        ]

    def _times(self) -> list[str]:
        """Return for what the times hold; nothing if none is predicted."""
        if not self.targets_before.time:
            return []
        machines = " and ".join(self.request.get("prices", ()))
        return [f"pass:    {self.request.get('workload')}, predicted for {machines}"]


HEADINGS = ("target", "shape", "format", "spec", "params", "MACs", "error")


def table(layers: Iterable[LayerPlan]) -> list[str]:
    """Return decisions as lines with aligned columns."""
    rows = [HEADINGS, *map(row, layers)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def row(layer: LayerPlan) -> tuple[str, ...]:
    """Return the table row of one decision."""
    spec = layer.note or " ".join(f"{k}={_short(v)}" for k, v in layer.spec.items())
    spec = f"{spec} {layer.grid.name}".strip() if layer.grid else spec
    error = "" if layer.error is None else f"{layer.error:.4f}"
    macs = (
        f"{layer.after.macs / layer.before.macs:.3f}"
        if layer.before.macs
        else f"{layer.after.macs}"
    )
    shape = f"{layer.shape[0]}x{layer.shape[1]}"
    return layer.name, shape, layer.format or "dense", spec, f"{layer.keep:.3f}", macs, error


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def change(before: Cost, after: Cost) -> str:
    """Return one line that compares two costs."""
    parts = []
    for name in ("params", "bytes", "macs"):
        old, new = getattr(before, name), getattr(after, name)
        parts.append(
            f"{name} {old:,} -> {new:,} ({new / old:.3f})" if old else f"{name} 0 -> {new:,}"
        )
    if before.time:
        old, new = before.time / 1e6, after.time / 1e6
        parts.append(f"time {old:,.3f} ms -> {new:,.3f} ms ({new / old:.3f})")
    return ", ".join(parts)


def _layer(
    shape: list[int], before: dict[str, int], after: dict[str, int], **rest: Any
) -> LayerPlan:
    rows, columns = shape
    layer = LayerPlan(shape=(rows, columns), before=Cost(**before), after=Cost(**after), **rest)
    plain = isinstance(layer.name, str) and isinstance(layer.spec, Mapping)
    plain = plain and (layer.precision is None or layer.grid is not None)  # which checks it
    if not plain or not type(rows) is type(columns) is int:
        raise ValueError(f"broken entry for {layer.name!r}")
    return layer


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs.

    Example:
        >>> total([Cost(1, 2, 3), Cost(1, 1, 1)])
        Cost(params=2, bytes=3, macs=4, time=0)
    """
    return sum(costs, start=Cost(0, 0, 0))
