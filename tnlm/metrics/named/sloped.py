"""The output error on data, with the slope of the loss along every singular component."""

from __future__ import annotations

from torch import Tensor

from tnlm.metrics.measure import INPUTS, SLOPES, Gathered, Measure, effect
from tnlm.metrics.metric import InputMoment


class Sloped(InputMoment):
    """The error of the output on data, which knows the gradient of the loss.

    Args:
        moment: C, ``(in, in)``.
        slope: the gradient of the loss with respect to the weight, ``(out, in)``.
        damping: see :class:`tnlm.metrics.sides.Side`.

    Example:
        >>> import torch
        >>> metric = Sloped(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), damping=0.0)
        >>> metric.changes(torch.diag(torch.tensor([3.0, 2.0]))).tolist()  # of the loss
        [-3.0, 2.0]
    """

    def __init__(self, moment: Tensor, slope: Tensor, damping: float = 1e-6) -> None:
        """Store the slope; see the class for the arguments."""
        super().__init__(moment, damping)
        self.slope = slope

    def changes(self, weight: Tensor) -> Tensor:
        """Return the first-order change of the loss when each singular component is dropped.

        With U the left singular vectors of ``W C^(1/2)``, largest first, component i of W is
        ``u_i u_i.T W``. Dropping it changes the loss by ``-u_i.T slope W.T u_i``, which is
        ``-sigma_i`` times the derivative with respect to ``sigma_i``.
        """
        basis = self.leading_outputs(weight, min(weight.shape))
        pulled = self.slope.double() @ weight.detach().double().T
        return -(basis * (pulled @ basis)).sum(0)


def _build(of: Gathered, damping: float) -> Sloped:
    return Sloped(of("moment"), of("slope"), damping)


MEASURES = (
    Measure(
        "sloped-input",
        "error of the output on data, with the slope of the loss (ZS-SVD)",
        build=_build,
        importance=effect("moment"),
        needs=frozenset({INPUTS, SLOPES}),
    ),
)
