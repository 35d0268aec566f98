"""Weights without one group of their singular values, and back again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tnlm.calibration.metrics import Metric
from tnlm.calibration.store import Statistics
from tnlm.errors import OptionError
from tnlm.targets import Target


class Truncation:
    """Cuts one group of singular values out of all targets at once; restores them at its end.

    With U the left singular vectors of group g of ``W C^(1/2)``, where C is the metric's, the
    weight without it is ``W - U U.T W``. Vectors and weights wait in temporary files when they are
    more than memory should hold.

    Args:
        model: its weights are changed in place.
        targets: the matrices.
        metric: weighs the columns of a target, or nothing.
        groups: how many equal parts the singular values of a matrix are cut into, largest first.
        progress: show a progress bar.

    Raises:
        OptionError: for fewer than one group, or more than a matrix has singular values.

    Example:
        >>> from tnlm.targets import Target
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([3.0, 4.0])))
        >>> target = Target("0", "0", "linear", (2, 2))
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
        """Find the singular vectors; see the class for the arguments."""
        check_groups(targets, groups)
        self._model, self._targets, self._groups = model, targets, groups
        self._kept = Statistics()
        self.energy = torch.zeros(groups, dtype=torch.float64)
        """Squared Frobenius norm of what each group takes, over all targets."""
        self.weighted = torch.zeros(groups, dtype=torch.float64)
        """The same in the metric."""
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
        """Give all targets their weights without a group, counted from 0, and with all others."""
        for target in self._targets:
            weight = self._kept.tensor(target.name, "weight").double()
            basis = self._kept.tensor(target.name, "basis")
            basis = basis[:, self._part(basis.shape[1], group)]
            target.weight(self._model).copy_(weight - basis @ (basis.T @ weight))

    def restore(self) -> None:
        """Give all targets the weights that they had."""
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
    """Raise `OptionError` unless every target has a singular value for each group."""
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise OptionError(f"groups={groups!r}; allowed: a whole number >= 1")
    for target in targets:
        most = min(target.shape)
        if groups > most:
            raise OptionError(
                f"groups={groups}, but {target.name} has {most} singular values; use "
                f"groups<={most}, or name it in ignore="
            )
