"""Rules for the precision in which weights are stored, and what it goes together with."""

from __future__ import annotations

from tnlm.allocation.base import Allocation
from tnlm.compression.choices import AUTO, Budget, Recovery
from tnlm.compression.rules import check_refine, refinement_asked
from tnlm.decompositions import get_format
from tnlm.errors import BudgetError, OptionError
from tnlm.precision.grid import Precision, precision_of
from tnlm.schemes.base import Scheme

BITS = (8, 6, 5, 4, 3, 2)
"""Bits that ``precision="auto"`` chooses from, beside the model's dtype."""


def check_precision(
    scheme: Scheme, allocation: Allocation, budget: Budget, unit: str, recovery: Recovery
) -> tuple[Precision | None, ...]:
    """Return the grids on which weights may be stored; None stands for the model's dtype.

    Raises:
        OptionError: if the precision is unknown, or does not go together with another choice.
    """
    if scheme.precision is None:
        _check_unused(scheme)
        return (None,)
    _check_together(scheme, budget, recovery)
    if scheme.precision != AUTO:
        _check_fixed(scheme, allocation, budget, unit)
        return (_grid(scheme, precision_of(scheme.precision, scheme.group)),)
    if not allocation.chooses_bits or unit != "bytes":
        raise OptionError(
            f"precision='auto' with unit={unit!r} and allocation={allocation.name!r}; allowed with "
            "unit='bytes' and allocation='loss', as in scheme 'auto-bytes'",
            argument=("precision", "unit", "allocation"),
        )
    grids = [precision_of(f"int{bits}", scheme.group if bits < 8 else None) for bits in BITS]
    return (None, *(_grid(scheme, grid) for grid in grids))


def _grid(scheme: Scheme, grid: Precision) -> Precision:
    return Precision(grid.bits, grid.group, scheme.symmetric)


def _check_unused(scheme: Scheme) -> None:
    unused = {"group": scheme.group, "symmetric": None if scheme.symmetric else False}
    for name, given in unused.items():
        if given is not None:
            raise OptionError(
                f"{name}={given!r} has no effect without precision=", argument=(name, "precision")
            )
    if not scheme.formats:
        raise OptionError(
            f"scheme {scheme.name!r} has no format and no precision; give one", argument="precision"
        )


def _check_together(scheme: Scheme, budget: Budget, recovery: Recovery) -> None:
    """Raise `OptionError` for choices that cannot be combined with codes."""
    if any("experts" in get_format(name).kinds for name in scheme.formats):
        raise OptionError(
            f"precision={scheme.precision!r} with scheme {scheme.name!r}, which drops whole "
            "experts and rounds nothing; drop them first, and give precision= in a second call, "
            "such as with scheme 'rtn'",
            argument="precision",
        )
    if budget.portable is not None:
        raise OptionError(
            f"precision={scheme.precision!r} with portable={budget.portable!r}, whose runtime has "
            "types of its own; export in one of them, such as dtype='q8_0'",
            argument=("precision", "portable"),
        )
    if (recovery.kind or scheme.recover) == "lora":
        raise OptionError(
            f"recover='lora' with precision={scheme.precision!r}: a LoRA merged into codes is lost "
            "where it is less than half a step; call tnlm.heal(model, ..., merge='adapter')",
            argument=("recover", "precision"),
        )
    if scheme.share > 1:
        raise OptionError(
            f"share= with precision={scheme.precision!r}; leave one of them out",
            argument=("share", "precision"),
        )
    asked = refinement_asked(*check_refine(recovery, scheme.refine_passes))
    if asked:
        if recovery.refine is None and recovery.refine_passes is None:
            asked += f", the default of scheme {scheme.name!r},"
        raise OptionError(
            f"{asked} with precision={scheme.precision!r}, but codes cannot be tuned; give "
            "refine=0, or leave precision= out",
            argument=("refine", "refine_passes", "precision"),
        )


def _check_fixed(scheme: Scheme, allocation: Allocation, budget: Budget, unit: str) -> None:
    """Raise `BudgetError` unless a budget has an effect beside a fixed precision."""
    if budget.tolerance is not None:
        raise BudgetError(
            f"tolerance= with precision={scheme.precision!r}: rounding comes on top of the error "
            "that it limits; give keep= or keep_targets=",
            argument=("tolerance", "precision", "keep", "keep_targets"),
        )
    given = [n for n in ("keep", "keep_targets") if getattr(budget, n) is not None]
    given += ["unit"] if budget.unit not in (None, "params") else []
    given += ["max_macs"] if budget.max_macs != 1.0 else []
    if given and not scheme.formats:
        raise BudgetError(
            f"{given[0]}= has no effect with scheme {scheme.name!r}, whose size is given by "
            "precision= and group=; allowed: precision='int2' to 'int8', or scheme 'auto-bytes'",
            argument=(given[0], "precision", "group"),
        )
    if unit == "bytes" and scheme.formats and not allocation.chooses_bits:
        raise BudgetError(
            f"unit='bytes' with precision={scheme.precision!r} and allocation="
            f"{allocation.name!r}; allowed with allocation='loss'",
            argument=("unit", "precision", "allocation"),
        )
