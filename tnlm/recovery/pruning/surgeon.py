"""LLM Surgeon: rows and columns of all matrices are removed in several shots, by one threshold.

Source: van der Ouderaa et al., The LLM Surgeon, ICLR 2024, arXiv 2312.17244.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.decompositions.surgery import remaining, removal_losses
from tnlm.errors import BudgetError
from tnlm.targets.base import Member

Sides = Callable[[Member, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns G of the kept rows and A of the kept columns of a target, damped, float64."""


@dataclass(frozen=True)
class Patient:
    """The rows and columns of a matrix that are kept so far, as sorted indices."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def whole(cls, target: Member) -> Patient:
        """Return a matrix of which nothing is removed."""
        return cls(*(torch.arange(size) for size in target.shape))

    def core(self, weight: Tensor) -> Tensor:
        """Return what is kept of an ``(out, in)`` weight."""
        return weight[self.rows.to(weight.device)][:, self.columns.to(weight.device)]


def operate(
    model: PreTrainedModel,
    targets: Sequence[Member],
    keep: float,
    shots: int,
    examine: Callable[[int], Sides],
) -> dict[str, Patient]:
    """Remove rows and columns from a model in place, and return what is kept of each matrix.

    Each shot measures the model as it then is, and removes the rows and columns of least loss until
    the matrices meet the shot's size; sizes fall linearly to ``keep``. What remains is updated for
    everything that was removed in the shot.

    Args:
        model: changed in place; removed rows and columns become zero.
        targets: the matrices.
        keep: fraction of all their parameters to keep.
        shots: in how many steps.
        examine: measures the model before a shot, whose number is given.

    Raises:
        BudgetError: if one row and one column of every matrix are too many.
    """
    found = {target.name: Patient.whole(target) for target in targets}
    total = sum(target.params for target in targets)
    for shot in range(shots):
        most = total * (1 - (shot + 1) / shots * (1 - keep))
        sides = examine(shot)
        losses = dict(_losses(model, targets, found, sides))
        limit = threshold(list(losses.values()), most)
        for target in targets:
            kept = _kept(found[target.name], losses[target.name], limit)
            _remove(model, target, found[target.name], kept, sides)
            found[target.name] = kept
    return found


def threshold(losses: Sequence[tuple[Tensor, Tensor]], most: float) -> float:
    """Return the least loss such that what costs no more may go, and the rest is small enough.

    Every matrix keeps at least a row and a column.

    Args:
        losses: of the rows and the columns of every matrix.
        most: parameters that may remain.

    Raises:
        BudgetError: if no threshold leaves so few.

    Example:
        >>> threshold([(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0]))], most=2)
        1.0
    """
    ordered = [(rows.sort().values, columns.sort().values) for rows, columns in losses]
    limits = torch.cat([part for pair in ordered for part in pair]).unique()

    def left(limit: Tensor) -> int:
        return sum(_count(rows, limit) * _count(columns, limit) for rows, columns in ordered)

    if sum(len(rows) * len(columns) for rows, columns in ordered) <= most:
        return float("-inf")
    if left(limits[-1]) > most:
        raise BudgetError(
            f"one row and one column of each matrix are more than {most:,.0f} parameters; raise "
            "keep_targets= or keep="
        )
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(limits[middle]) <= most else (middle + 1, high)
    return float(limits[low])


def _count(ordered: Tensor, limit: Tensor) -> int:
    """Return how many sorted losses exceed a limit, at least one."""
    return max(len(ordered) - int(torch.searchsorted(ordered, limit, right=True)), 1)


def _losses(
    model: PreTrainedModel, targets: Sequence[Member], found: Mapping[str, Patient], sides: Sides
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for target in targets:
        kept = found[target.name]
        core = kept.core(target.weight(model)).double()
        rows, columns = removal_losses(core, *sides(target, kept.rows, kept.columns))
        yield target.name, (rows.cpu(), columns.cpu())


def _kept(before: Patient, losses: tuple[Tensor, Tensor], limit: float) -> Patient:
    """Return the rows and columns whose loss exceeds the limit, at least the dearest of each."""
    rows, columns = (each > limit for each in losses)
    for kept, own in zip((rows, columns), losses, strict=True):
        kept[own.argmax()] = True
    return Patient(before.rows[rows], before.columns[columns])


def _remove(
    model: PreTrainedModel, target: Member, before: Patient, after: Patient, sides: Sides
) -> None:
    """Write the updated rest of a matrix into the model, and zeros elsewhere."""
    weight = target.weight(model)
    rows, columns = (
        torch.searchsorted(old, new).to(weight.device)
        for old, new in ((before.rows, after.rows), (before.columns, after.columns))
    )
    both = sides(target, before.rows, before.columns)
    core = remaining(before.core(weight).double(), *both, rows, columns)
    whole = torch.zeros_like(weight)
    whole[after.rows.to(weight.device)[:, None], after.columns.to(weight.device)] = core.to(whole)
    module = model.get_submodule(target.module)
    with torch.no_grad():
        target.write(module, module.weight.data, whole)  # type: ignore[arg-type]
