"""Removes one group of singular values from the weights of a model, and restores them exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tnlm.calibration.store import Statistics
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.targets.base import Target
from tnlm.utils.checks import check_whole


class Truncation:
    """Removes one group of singular values from all targets at once; on leaving, restores them.

    If U holds the left singular vectors of a group of ``W C^(1/2)``, where C belongs to the metric,
    the weight without the group is ``W - U U.T W``. Vectors and weights are kept in temporary files
    where they are too large for memory.

    Args:
        model: its weights are changed in place.
        targets: the matrices.
        metric: returns the metric of a target, which may weight its columns.
        groups: how many equal groups the singular values of a matrix are split into, largest first.
        progress: show a progress bar.

    Raises:
        OptionError: if there are no groups, or more groups than a matrix has singular values.

    Example:
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 4.0])))
        >>> target = MatrixTarget("0", "0", (2, 2))
        >>> with Truncation(model, [target], lambda _: Metric(), 2, progress=False) as cut:
        ...     cut.drop(0)
        ...     model[0].weight.abs().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
        >>> model[0].weight.tolist(), cut.energy.tolist()
        ([[3.0, 0.0], [0.0, 4.0]], [16.0, 9.0])
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        metric: Callable[[Target], Metric],
        groups: int,
        *,
        progress: bool,
    ) -> None:
        """Compute the singular vectors; see the class for the arguments."""
        check_groups(targets, groups)
        self._model, self._targets, self._groups = model, targets, groups
        self._kept = Statistics()
        self.energy = torch.zeros(groups, dtype=torch.float64)
        """Squared Frobenius norm of what removing each group changes, summed over targets."""
        self.weighted = torch.zeros(groups, dtype=torch.float64)
        """The same in the norm of the metric."""
        for target in tqdm(targets, desc="decomposing", unit="matrix", disable=not progress):
            self._add(target, metric(target))

    def _add(self, target: Target, metric: Metric) -> None:
        weight = target.weight(self._model).cpu()
        basis = metric.leading_outputs(weight, min(target.shape))
        rows = basis.T @ weight.double()
        scaled = rows if metric.inputs is None else metric.inputs.scale(rows)
        for group in range(self._groups):
            part = self._part(len(rows), group)
            self.energy[group] += rows[part].square().sum()
            self.weighted[group] += scaled[part].square().sum()
        kept = {"basis": basis.contiguous(), "weight": _copy(weight)}
        self._kept.put(target.name, [target.name], kept)

    def _part(self, size: int, group: int) -> slice:
        return slice(size * group // self._groups, size * (group + 1) // self._groups)

    def drop(self, group: int) -> None:
        """Set the weights of all targets to those without one group, counted from 0."""
        for target in self._targets:
            weight = self._kept.tensor(target.name, "weight").double()
            basis = self._kept.tensor(target.name, "basis")
            basis = basis[:, self._part(basis.shape[1], group)]
            target.weight(self._model).copy_(weight - basis @ (basis.T @ weight))

    def restore(self) -> None:
        """Restore the weights of all targets."""
        for target in self._targets:
            target.weight(self._model).copy_(self._kept.tensor(target.name, "weight"))

    def __enter__(self) -> Truncation:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Restore the weights, also after an error."""
        self.restore()


def _copy(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.contiguous_format)


def check_groups(targets: Sequence[Target], groups: int) -> None:
    """Raise `OptionError` unless every target has at least one singular value per group."""
    check_whole("groups", groups)
    for target in targets:
        most = min(target.shape)
        if groups > most:
            raise OptionError(
                f"groups={groups}, but {target.name} has {most} singular values; use "
                f"groups<={most}, or name it in ignore=",
                argument="ignore",
            )
