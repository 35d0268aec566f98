from __future__ import annotations

import math

import pytest
import torch

from tnlm.errors import EvaluationError
from tnlm.evaluation.number import LARGEST, exponential, finite


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3.0, requires_grad=True)])
def test_numbers_are_floats(value):
    assert finite(value, "it") == 3.0


@pytest.mark.parametrize("value", ["3", None, [1, 2], torch.ones(2), math.inf, math.nan])
def test_all_else_is_refused_by_name(value):
    with pytest.raises(EvaluationError, match=r"^the score is"):
        finite(value, "the score")


def test_a_perplexity_is_a_float_or_an_error():
    assert exponential(math.log(25.0)) == pytest.approx(25.0)
    assert math.isfinite(exponential(LARGEST))
    with pytest.raises(EvaluationError, match="the mean loss is 1000"):
        exponential(1000.0)
