"""What the user asks for, checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tnlm.allocation import get_allocation
from tnlm.allocation.base import Allocation, Limits
from tnlm.calibration.measures import (
    FISHER,
    GRADIENTS,
    INPUTS,
    MEASURES,
    Measure,
    get_measure,
)
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Format, from_dict
from tnlm.errors import BudgetError, OptionError, did_you_mean
from tnlm.network import Cost
from tnlm.schemes import get_scheme
from tnlm.schemes.base import Scheme

BUDGETS = ("keep", "keep_targets", "tolerance")
SIZES = ("rank", "ranks", "terms")
UNITS = ("params", "bytes", "macs")
CASCADES = ("none", "sequential", "anchored")


@dataclasses.dataclass(frozen=True)
class Request:
    """A scheme with its options and at most one budget.

    Attributes:
        scheme: the named scheme.
        structures: its formats.
        measure: how errors are measured.
        allocation: how the budget is shared out.
        cascade: what a fit knows of earlier ones.
        damping: share of a second moment that is replaced by its mean diagonal.
        refine: tokens on which every block is tuned after fitting; 0 for none.
        share: consecutive blocks whose matrices share their input factor; 1 for none.
        options: the format's options, defaults of the scheme included.
        keep: fraction of the whole model's parameters, or None.
        keep_targets: fraction of the targets' parameters, or None.
        tolerance: relative error allowed, or None.
        max_macs: multiply-adds per token, as a multiple of dense.
        unit: what the budget counts.
        blocks: how many of the last blocks are cut, for an allocation that asks.
    """

    scheme: Scheme
    structures: tuple[Format[Any], ...]
    measure: Measure
    allocation: Allocation
    cascade: str
    damping: float
    refine: int
    share: int
    options: Mapping[str, Any]
    keep: float | None
    keep_targets: float | None
    tolerance: float | None
    max_macs: float
    unit: str
    blocks: int | None

    @property
    def needs(self) -> frozenset[str]:
        """The kinds of statistics that the metric and the allocation need."""
        needed = self.measure.needs
        if self.allocation.weighs_loss and not needed & {GRADIENTS, FISHER}:
            needed = needed | {INPUTS, GRADIENTS}
        return needed

    @property
    def looks_at_data(self) -> bool:
        """Whether calibration data is needed."""
        return bool(self.needs) or self.cascade != "none" or self.refine > 0

    def limits(self, model: Cost, targets: Cost) -> Limits:
        """Return what the matrices may cost.

        Args:
            model: cost of the whole model.
            targets: cost of the targets.

        Raises:
            BudgetError: if ``keep`` is less than what lies outside the targets.
        """
        keep = 1.0 if self.tolerance is not None else self.keep_targets
        if self.keep is not None:
            whole, part = getattr(model, self.unit), getattr(targets, self.unit)
            rest = whole - part
            keep = (self.keep * whole - rest) / part
            if keep <= 0:
                least = min(math.floor(1000 * rest / whole + 1) / 1000, 1.0)
                raise BudgetError(
                    f"keep={self.keep:g} of {whole:,} {_words(self.unit)}, but {rest:,} lie "
                    f"outside the targets; the smallest possible is keep={least:.3f}, or add targets"
                )
        if keep is None:
            keep = 1.0 if self._size_is_given() else self.scheme.keep_targets
        return Limits(keep, self.tolerance, self.max_macs, self.options, self.unit, self.blocks)

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
            "allocation": self.allocation.name,
            "cascade": self.cascade,
            "damping": self.damping if self.measure.needs else None,
            "refine": self.refine or None,
            "share": self.share if self.share > 1 else None,
            "unit": self.unit,
            "blocks": self.blocks,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
        }
        return {key: value for key, value in values.items() if value is not None}


def make_request(
    scheme: str,
    *,
    metric: str | None = None,
    allocation: str | None = None,
    cascade: str | None = None,
    damping: float | None = None,
    refine: int = 0,
    share: int | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    tolerance: float | None = None,
    max_macs: float = 1.0,
    unit: str = "params",
    blocks: int | None = None,
    options: Mapping[str, Any],
) -> Request:
    """Check a request and return it.

    Raises:
        OptionError: for an unknown scheme, metric, allocation, cascade or option, or an ill-typed
            value, or choices that do not go together.
        BudgetError: for a budget out of range, or more than one.

    Example:
        >>> make_request("kron", options={"terms": 4}).structures[0].name
        'kronecker'
    """
    named = get_scheme(scheme)
    structures = tuple(get_format(name) for name in named.formats)
    measure = get_measure(named.metric if metric is None else metric)
    _check_measure(scheme, structures, measure)
    shared = get_allocation(named.allocation if allocation is None else allocation)
    chain = named.cascade if cascade is None else cascade
    given = {key: value for key, value in options.items() if value is not None}
    _check_options(scheme, structures, given)
    budgets = {"keep": keep, "keep_targets": keep_targets, "tolerance": tolerance}
    _check_budgets({name: value for name, value in budgets.items() if value is not None})
    sizes = [name for name in SIZES if name in given]
    if tolerance is not None and sizes:
        raise BudgetError(f"tolerance and {sizes[0]} given; a tolerance chooses {sizes[0]} itself")
    if not _is_number(max_macs) or not max_macs > 0:
        raise BudgetError(f"max_macs={max_macs!r}; allowed: a number > 0, or inf")
    _check_damping(measure, damping)
    _check_cascade(measure, chain)
    _check_channels(structures, measure, chain)
    shared_blocks = named.share if share is None else share
    _check_share(structures, measure, chain, shared_blocks)
    if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
        raise OptionError(f"refine={refine!r}; allowed: a number of tokens, 0 for none")
    _check_shared(shared, tolerance, unit, blocks)
    return Request(
        named,
        structures,
        measure,
        shared,
        chain,
        measure.damping if damping is None else damping,
        refine,
        shared_blocks,
        {**named.defaults, **given},
        keep,
        keep_targets,
        tolerance,
        float(max_macs),
        unit,
        blocks,
    )


def _check_measure(scheme: str, structures: Sequence[Format[Any]], measure: Measure) -> None:
    kind = "elementwise" if measure.is_elementwise else "separable"
    for structure in structures:
        if measure.needs and kind not in structure.metrics:
            raise OptionError(
                f"metric={measure.name!r} with scheme {scheme!r}: a {structure.name} can be fitted "
                f"under {_allowed(structure)} only"
            )


def _allowed(structure: Format[Any]) -> str:
    kinds = {m.name for m in MEASURES.values() if not m.needs}
    for measure in MEASURES.values():
        kind = "elementwise" if measure.is_elementwise else "separable"
        if kind in structure.metrics:
            kinds.add(measure.name)
    return ", ".join(sorted(kinds))


def _check_options(
    scheme: str, structures: Sequence[Format[Any]], given: Mapping[str, Any]
) -> None:
    """Every option must belong to a format, and have a legal value there."""
    known: set[str] = set()
    for structure in structures:
        fields = {item.name: _placeholder(item) for item in dataclasses.fields(structure.spec)}
        known |= fields.keys()
        from_dict(structure.spec, fields | {k: v for k, v in given.items() if k in fields})
    for name in given:
        if name not in known:
            raise OptionError(
                f"unknown option {name!r} for scheme {scheme!r}{did_you_mean(name, known)}"
            )


def _placeholder(item: dataclasses.Field[Any]) -> Any:
    """A legal value for a field that the user left open, so that the given ones are checked."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return (1,) if "tuple" in str(item.type) else 1


def _check_damping(measure: Measure, damping: float | None) -> None:
    if damping is None:
        return
    if not measure.needs:
        raise OptionError("damping= has no effect on metric='identity'; leave it out")
    if not _is_number(damping) or not 0 <= damping < 1:
        raise OptionError(f"damping={damping!r}; allowed: a fraction in [0, 1)")


def _check_cascade(measure: Measure, cascade: str) -> None:
    if cascade not in CASCADES:
        raise OptionError(f"unknown cascade {cascade!r}{did_you_mean(str(cascade), CASCADES)}")
    if cascade != "none" and INPUTS not in measure.needs:
        raise OptionError(
            f"cascade={cascade!r} with metric={measure.name!r}, which does not look at inputs; "
            "allowed: a metric that does, such as 'input' or 'two-sided'"
        )


def _check_channels(structures: Sequence[Format[Any]], measure: Measure, cascade: str) -> None:
    if not any("channels" in structure.kinds for structure in structures):
        return
    if measure.name not in ("input", "two-sided") or cascade != "none":
        raise OptionError(
            f"metric={measure.name!r} and cascade={cascade!r} with channels, which are chosen "
            "together; allowed: metric='input' or 'two-sided', and cascade='none'"
        )


def _check_share(
    structures: Sequence[Format[Any]], measure: Measure, cascade: str, share: int
) -> None:
    if not isinstance(share, int) or isinstance(share, bool) or share < 1:
        raise OptionError(f"share={share!r}; allowed: a number of blocks, 1 for none")
    if share == 1:
        return
    wrong = [structure.name for structure in structures if not structure.stacks]
    if wrong or cascade != "none" or measure.adds_bias:
        what = f"a {wrong[0]}" if wrong else f"cascade={cascade!r} or metric={measure.name!r}"
        raise OptionError(
            f"share={share} with {what}; allowed: low rank, cascade='none', and a metric that "
            "adds no bias"
        )


def _check_shared(
    allocation: Allocation, tolerance: float | None, unit: str, blocks: int | None
) -> None:
    if unit not in UNITS:
        raise BudgetError(f"unknown unit {unit!r}{did_you_mean(str(unit), UNITS)}")
    if unit not in allocation.units:
        raise BudgetError(
            f"unit={unit!r} with allocation={allocation.name!r}; allowed: "
            + ", ".join(allocation.units)
        )
    if tolerance is not None and not allocation.tolerates:
        raise BudgetError(
            f"tolerance with allocation={allocation.name!r}, which shares out a budget; pass keep "
            "or keep_targets, or allocation='uniform'"
        )
    if blocks is None:
        return
    if not allocation.counts_blocks:
        raise OptionError(f"blocks={blocks!r} has no effect on allocation={allocation.name!r}")
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise OptionError(f"blocks={blocks!r}; allowed: a whole number >= 1")


def _check_budgets(given: Mapping[str, Any]) -> None:
    if len(given) > 1:
        raise BudgetError(f"{' and '.join(given)} given; allowed: one of {', '.join(BUDGETS)}")
    for name, value in given.items():
        if not _is_number(value) or not 0 < value <= 1:
            raise BudgetError(f"{name}={value!r}; allowed: a fraction in (0, 1]")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(unit: str) -> str:
    return {"params": "parameters", "macs": "multiply-adds"}.get(unit, unit)
