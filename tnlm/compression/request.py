"""A user's request, checked before any work starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnlm.allocation import get_allocation
from tnlm.allocation.base import Allocation, Limits
from tnlm.allocation.clock import Clock, Workload
from tnlm.compression.bit_rules import check_precision
from tnlm.compression.budget_rules import check_budgets, check_shared, check_time
from tnlm.compression.choices import SIZES, Asked, gather_choices
from tnlm.compression.portable import portable
from tnlm.compression.rules import (
    check_anchor,
    check_cascade,
    check_channels,
    check_damping,
    check_fitting,
    check_joint,
    check_measure,
    check_options,
    check_recover,
    check_refine,
    check_share,
    check_shared_formats,
    check_split,
)
from tnlm.compression.token_rules import check_tokens
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Format
from tnlm.errors import BudgetError
from tnlm.metrics.measure import FISHER, GRADIENTS, INPUTS, MOVEMENT, Measure
from tnlm.metrics.named import get_measure
from tnlm.precision.grid import Precision
from tnlm.recovery.kinds import tokens_of
from tnlm.schemes.base import Scheme
from tnlm.tensors.network import Cost


@dataclasses.dataclass(frozen=True)
class Request:
    """A scheme with its options and at most one budget.

    Attributes:
        scheme: the named scheme.
        structures: its formats.
        measure: how errors are measured.
        allocation: how the budget is split across matrices.
        cascade: how fits account for earlier ones.
        damping: fraction of a second moment replaced by its mean diagonal.
        anchor: fraction of the anchoring in a cascade.
        refine: tokens to tune each block on after fitting; 0 for none, or for passes.
        refine_passes: passes over the windows trained on, which tune each block; 0 for none, or
            for tokens.
        share: consecutive blocks whose matrices share their input factor; 1 for none.
        recover: how the whole model is trained after fitting; ``"none"`` for no training.
        recover_tokens: tokens for this training, and for metrics that prune.
        options: the formats' options, with the scheme's defaults.
        keep: fraction of the whole model's parameters to keep, or None.
        keep_targets: fraction of the targets' parameters to keep, or None.
        tolerance: relative error allowed per matrix, or None.
        max_macs: most multiply-adds per matrix, as a multiple of dense.
        unit: the unit of the budget.
        blocks: how many last blocks to compress, for allocations that take it.
        workload: what a budget in time predicts; None for other units.
        prices: file with a machine's times for it; None for this machine's.
        training: training data; the calibration data if None.
        portable: runtime that runs the result without tnlm, or None.
        grids: on which weights may be stored; None for the model's dtype.
    """

    scheme: Scheme
    structures: tuple[Format[Any], ...]
    measure: Measure
    allocation: Allocation
    cascade: str
    damping: float
    anchor: float
    refine: int
    refine_passes: int
    share: int
    recover: str
    recover_tokens: int
    options: Mapping[str, Any]
    keep: float | None
    keep_targets: float | None
    tolerance: float | None
    max_macs: float
    unit: str
    blocks: int | None
    workload: Workload | None = None
    prices: str | Path | None = None
    training: Any = None
    portable: str | None = None
    grids: tuple[Precision | None, ...] = (None,)

    @property
    def grid(self) -> Precision | None:
        """The grid of all weights; None for the model's dtype, or if the allocation chooses."""
        return self.grids[0] if len(self.grids) == 1 else None

    @property
    def rounds_unmeasured(self) -> bool:
        """Whether targets that data cannot measure are stored in few bits, each to the nearest."""
        return self.grid is not None and not self.structures

    @property
    def needs(self) -> frozenset[str]:
        """The kinds of statistics that the metric and the allocation need."""
        needed = self.measure.needs
        if self.allocation.weighs_loss and not needed & {GRADIENTS, FISHER}:
            needed = needed | {INPUTS, GRADIENTS}
        return needed

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of targets that its formats replace."""
        formats = self.structures
        dense = () if self.grids == (None,) else ("linear", "embedding")
        return frozenset(dense).union(*(each.kinds | each.made_of for each in formats))

    @property
    def trains(self) -> bool:
        """Whether anything is trained on ``recover_tokens`` tokens."""
        return self.recover != "none" or MOVEMENT in self.measure.needs

    @property
    def looks_at_data(self) -> bool:
        """Whether data is needed."""
        return self.measures or self.trains

    @property
    def measures(self) -> bool:
        """Whether calibration data is needed for more than training."""
        return bool(self.needs - {MOVEMENT}) or self.cascade != "none" or self.refines

    @property
    def refines(self) -> bool:
        """Whether blocks are tuned after they are fitted."""
        return bool(self.refine or self.refine_passes)

    def limits(self, model: Cost, targets: Cost, clock: Clock | None = None) -> Limits:
        """Return the limits on the cost of the matrices.

        Args:
            model: cost of the whole model.
            targets: cost of the targets.
            clock: predicts times, if they are the unit.

        Raises:
            BudgetError: if ``keep`` is less than the fraction outside the targets.
        """
        keep = 1.0 if self.tolerance is not None else self.keep_targets
        if self.keep is not None:
            whole, part = getattr(model, self.unit), getattr(targets, self.unit)
            rest = whole - part
            if part == 0:
                raise BudgetError(
                    f"keep={self.keep:g} counts {_words(self.unit)}, but the targets have none; "
                    "add targets, or use another unit",
                    argument="keep",
                )
            keep = (self.keep * whole - rest) / part
            if keep <= 0:
                least = min(math.floor(1000 * rest / whole + 1) / 1000, 1.0)
                raise BudgetError(
                    f"keep={self.keep:g} of {whole:,} {_words(self.unit)}, but {rest:,} lie "
                    f"outside the targets; the smallest possible is keep={least:.3f}, "
                    "or add targets",
                    argument="keep",
                )
        if keep is None:
            keep = 1.0 if self._size_is_given() else self.scheme.keep_targets
        fixed = self.tolerance, self.max_macs, self.options, self.unit, self.blocks
        return Limits(keep, *fixed, clock)

    def _size_is_given(self) -> bool:
        """Whether the options alone determine the size of the factors."""
        return all(_is_sized(structure, self.options) for structure in self.structures)

    def record(self) -> dict[str, Any]:
        """Return the request as plain values."""
        off = 0 if self.scheme.refine_passes else None  # said only where it is not the default
        values = {
            "keep": self.keep,
            "keep_targets": self.keep_targets,
            "tolerance": self.tolerance,
            "max_macs": self.max_macs if math.isfinite(self.max_macs) else None,
            "allocation": self.allocation.name,
            "cascade": self.cascade,
            "anchor": self.anchor if self.anchor != 1.0 else None,
            "damping": self.damping if self.measure.needs else None,
            "refine": self.refine or None,
            "refine_passes": None if self.refine else self.refine_passes or off,
            "share": self.share if self.share > 1 else None,
            "split": self.scheme.split and None,
            "recover": self.recover if self.recover != "none" else None,
            "recover_tokens": self.recover_tokens if self.trains else None,
            "precision": self.scheme.precision,
            "group": self.scheme.group,
            "symmetric": None if self.scheme.symmetric else False,
            "unit": self.unit,
            "blocks": self.blocks,
            "workload": None if self.workload is None else str(self.workload),
            "portable": self.portable,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
        }
        return {key: value for key, value in values.items() if value is not None}


def make_request(scheme: str | Scheme, **given: Any) -> Request:
    """Check a request and return it.

    Args:
        scheme: a name, or a scheme.
        **given: keywords of `tnlm.compress`, and options of the scheme's formats.

    Raises:
        OptionError: if a name, an option or a value is invalid, or choices are incompatible.
        BudgetError: if a budget is out of range, or several are given.

    Example:
        >>> make_request("kron", terms=4).structures[0].name
        'kronecker'
    """
    return request_of(gather_choices(scheme, given))


def request_of(asked: Asked) -> Request:
    """Check the arguments and return them as a request; see :func:`make_request`."""
    budget, recovery = asked.budget, asked.recovery
    named = portable(asked.scheme, budget.portable)
    structures = tuple(get_format(name) for name in named.formats)
    measure, shared = get_measure(named.metric), get_allocation(named.allocation)
    check_measure(named.name, structures, measure)
    options = {**named.defaults, **asked.options}
    check_options(named.name, structures, options)
    check_fitting(structures, measure, asked.options)
    sizes = [name for name in SIZES if name in asked.options]
    check_budgets(budget, sizes)
    check_damping(measure, named.damping)
    check_cascade(measure, named.cascade)
    check_channels(structures, measure, named.cascade)
    check_joint(structures, measure, named.cascade)
    check_share(structures, measure, named.cascade, named.share)
    check_split(named.split)
    check_anchor(named.cascade, named.anchor)
    tokens, passes = check_refine(recovery, named.refine_passes)
    after = named.recover if recovery.kind is None else recovery.kind
    check_recover(structures, measure, after, recovery.tokens)
    unit = check_shared(shared, budget, named.unit)
    check_shared_formats(shared, structures, measure, sizes)
    check_tokens(shared, measure)
    grids = check_precision(named, shared, budget, unit, recovery)
    return Request(
        scheme=named,
        structures=structures,
        measure=measure,
        allocation=shared,
        cascade=named.cascade,
        damping=measure.damping if named.damping is None else named.damping,
        anchor=float(named.anchor),
        refine=tokens,
        refine_passes=passes,
        share=named.share,
        recover=after,
        recover_tokens=tokens_of(after) if recovery.tokens is None else recovery.tokens,
        options=options,
        keep=budget.keep,
        keep_targets=budget.keep_targets,
        tolerance=budget.tolerance,
        max_macs=float(budget.max_macs),
        unit=unit,
        blocks=budget.blocks,
        workload=check_time(budget, unit, named.precision),
        prices=budget.prices,
        training=recovery.training,
        portable=budget.portable,
        grids=grids,
    )


def _is_sized(structure: Format[Any], options: Mapping[str, Any]) -> bool:
    fields = {item.name for item in dataclasses.fields(structure.spec)}
    sizes = fields & {"rank", "ranks", "width"} or fields & {"terms", "out_split", "in_split"}
    return bool(sizes) and sizes <= options.keys()


def _words(unit: str) -> str:
    return {"params": "parameters", "macs": "multiply-adds", "time": "nanoseconds"}.get(unit, unit)
