"""Problems of a few small matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tnlm.allocation.base import Limits, Problem
from tnlm.decompositions import get_format
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.targets.channels import pairs
from tnlm.targets.matrix import MatrixTarget


@pytest.fixture(scope="session")
def make_problem(gaussian) -> Callable[..., Problem]:
    """Make a problem of matrices of the given shapes, each with its effect on the loss."""

    def make(shapes, keep, *, effects=None, seed=0, formats=("low-rank",), metric=None, **limits):
        model, targets = nn.ModuleDict(), []
        for index, shape in enumerate(shapes):
            name = f"m{index}"
            model[name] = nn.Linear(shape[1], shape[0], bias=False)
            # Spectra that fall at different rates.
            fall = torch.linspace(0, -index - 1, shape[1], dtype=torch.float64).exp()
            model[name].weight = nn.Parameter(gaussian(*shape, seed=seed + index) * fall)
            targets.append(MatrixTarget(name, name, tuple(shape)))
        weights = effects or [1.0] * len(shapes)
        measure = metric or Metric()
        return Problem(
            model,
            targets,
            [get_format(name) for name in formats],
            lambda target: measure,
            lambda target: weights[int(target.name[1:])],
            Limits(keep, **limits),
        )

    return make


class Pair(nn.Module):
    """A feed-forward layer."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(*s, bias=False) for s in ((width, hidden), (hidden, width)))

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


@pytest.fixture(scope="session")
def make_pairs(gaussian) -> Callable[..., Problem]:
    """Make a problem of feed-forward pairs, whose channels may go, and a matrix that stands alone.

    ``alike`` makes channels of a pair agree in their data, so that most of them can go.
    """

    def make(keep, *, count=2, hidden=12, width=6, alike=(), seed=0, **limits):
        model = nn.ModuleDict({"h": nn.ModuleList(), "head": nn.Linear(width, width, bias=False)})
        moments = {}
        for index in range(count):
            model["h"].append(Pair(width, hidden))
            up, down = model["h"][index].fc1, model["h"][index].fc2
            up.weight = nn.Parameter(gaussian(hidden, width, seed=seed + 2 * index))
            down.weight = nn.Parameter(gaussian(width, hidden, seed=seed + 2 * index + 1))
            rank = 2 if index in alike else hidden
            data = gaussian(40, rank, seed=seed + 90) @ gaussian(rank, hidden, seed=seed + 91)
            moments[f"h.{index}.fc2"] = Side(data.T @ data / 40, 1e-6)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [
            MatrixTarget(name, name, tuple(model.get_submodule(name).weight.shape))
            for name in names
        ]

        def metric(target):
            reader = getattr(target, "consumer", None)
            if reader is not None:
                return Metric(outputs=moments[reader.name])
            return Metric(inputs=moments.get(target.name))

        return Problem(
            model,
            targets,
            [get_format("low-rank"), get_format("channels")],
            metric,
            lambda target: 1.0,
            Limits(keep, **limits),
            joint=pairs(model, targets),
        )

    return make
