"""The error of several matrices is the weighted sum of theirs."""

from __future__ import annotations

import math

import torch

from tnlm.metrics.metric import InputMoment, Metric
from tnlm.metrics.several import Several


def test_norms_and_spectra_add_up():
    stack = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    parts = [Metric, lambda: InputMoment(data.T @ data)]
    several = Several(parts, [2.0, 0.5])
    squares = [2.0 * Metric().norm(stack[0]) ** 2, 0.5 * parts[1]().norm(stack[1]) ** 2]
    assert math.isclose(several.norm(stack), math.sqrt(sum(squares)))
    assert math.isclose(float(several.spectrum(stack).sum()), sum(squares), rel_tol=1e-9)
    assert [energy for _, _, energy in several.each(stack)] == squares
    assert several.relative(stack, torch.zeros_like(stack)) == 1.0


def test_one_metric_is_that_of_each():
    stack = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    one = InputMoment(torch.diag(torch.arange(1.0, 5.0)))
    several = Several.of(one, 3)
    assert math.isclose(several.norm(stack) ** 2, sum(one.norm(each) ** 2 for each in stack))
    assert Several.of(several, 3) is several
