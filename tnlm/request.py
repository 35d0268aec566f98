"""What the user asks for, checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tnlm.allocation.uniform import Limits
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Format, from_dict
from tnlm.errors import BudgetError, OptionError, did_you_mean
from tnlm.schemes import get_scheme
from tnlm.schemes.base import Scheme

DEFAULT_KEEP = 0.8
"""Fraction of the targets kept when nothing else says how large the result may be."""

METRICS = ("identity", "input")
BUDGETS = ("keep", "keep_targets", "tolerance")
SIZES = ("rank", "ranks", "terms")


@dataclasses.dataclass(frozen=True)
class Request:
    """A scheme with its options and at most one budget.

    Attributes:
        scheme: the named scheme.
        structure: its format.
        metric: name of the metric.
        options: the format's options, defaults of the scheme included.
        keep: fraction of the whole model's parameters, or None.
        keep_targets: fraction of the targets' parameters, or None.
        tolerance: relative error allowed, or None.
        max_macs: multiply-adds per token, as a multiple of dense.
    """

    scheme: Scheme
    structure: Format[Any]
    metric: str
    options: Mapping[str, Any]
    keep: float | None
    keep_targets: float | None
    tolerance: float | None
    max_macs: float

    def limits(self, model_params: int, target_params: int) -> Limits:
        """Return what each matrix may cost.

        Raises:
            BudgetError: if ``keep`` is less than what lies outside the targets.
        """
        keep = 1.0 if self.tolerance is not None else self.keep_targets
        if self.keep is not None:
            rest = model_params - target_params
            keep = (self.keep * model_params - rest) / target_params
            if keep <= 0:
                least = min(math.floor(1000 * rest / model_params + 1) / 1000, 1.0)
                raise BudgetError(
                    f"keep={self.keep:g} of {model_params:,} parameters, but {rest:,} lie outside "
                    f"the targets; the smallest possible is keep={least:.3f}, or add targets"
                )
        if keep is None:
            keep = 1.0 if self._size_is_given() else DEFAULT_KEEP
        return Limits(keep, self.tolerance, self.max_macs, self.options)

    def _size_is_given(self) -> bool:
        """Whether the options alone fix how large the factors are."""
        given = set(self.options)
        return bool(given & {"rank", "ranks"}) or {"terms", "out_split", "in_split"} <= given

    def record(self) -> dict[str, Any]:
        """Return what was asked, as plain values."""
        values = {
            "keep": self.keep,
            "keep_targets": self.keep_targets,
            "tolerance": self.tolerance,
            "max_macs": self.max_macs if math.isfinite(self.max_macs) else None,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
        }
        return {key: value for key, value in values.items() if value is not None}


def make_request(
    scheme: str,
    *,
    metric: str | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    tolerance: float | None = None,
    max_macs: float = 1.0,
    options: Mapping[str, Any],
) -> Request:
    """Check a request and return it.

    Raises:
        OptionError: for an unknown scheme, metric or option, or an ill-typed value.
        BudgetError: for a budget out of range, or more than one.

    Example:
        >>> make_request("kron", options={"terms": 4}).structure.name
        'kronecker'
    """
    named = get_scheme(scheme)
    structure = get_format(named.format)
    chosen = named.metric if metric is None else metric
    if chosen not in METRICS:
        raise OptionError(f"unknown metric {chosen!r}{did_you_mean(str(chosen), METRICS)}")
    if chosen not in structure.metrics:
        raise OptionError(
            f"metric={chosen!r} with scheme {scheme!r}; a {structure.name} can be fitted under: "
            + ", ".join(sorted(structure.metrics))
        )
    given = {key: value for key, value in options.items() if value is not None}
    _check_options(scheme, structure, given)
    budgets = {"keep": keep, "keep_targets": keep_targets, "tolerance": tolerance}
    _check_budgets({name: value for name, value in budgets.items() if value is not None})
    sizes = [name for name in SIZES if name in given]
    if tolerance is not None and sizes:
        raise BudgetError(f"tolerance and {sizes[0]} given; a tolerance chooses {sizes[0]} itself")
    if not _is_number(max_macs) or not max_macs > 0:
        raise BudgetError(f"max_macs={max_macs!r}; allowed: a number > 0, or inf")
    return Request(
        named,
        structure,
        chosen,
        {**named.defaults, **given},
        keep,
        keep_targets,
        tolerance,
        float(max_macs),
    )


def _check_options(scheme: str, structure: Format[Any], given: Mapping[str, Any]) -> None:
    fields = {item.name for item in dataclasses.fields(structure.spec)}
    for name in given:
        if name not in fields:
            raise OptionError(
                f"unknown option {name!r} for scheme {scheme!r}{did_you_mean(name, fields)}"
            )
    placeholder = {field.name: _placeholder(field) for field in dataclasses.fields(structure.spec)}
    from_dict(structure.spec, placeholder | dict(given))


def _placeholder(item: dataclasses.Field[Any]) -> Any:
    """A legal value for a field that the user left open, so that the given ones are checked."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return (1,) if "tuple" in str(item.type) else 1


def _check_budgets(given: Mapping[str, Any]) -> None:
    if len(given) > 1:
        raise BudgetError(f"{' and '.join(given)} given; allowed: one of {', '.join(BUDGETS)}")
    for name, value in given.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise BudgetError(f"{name}={value!r}; allowed: a fraction in (0, 1]")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
