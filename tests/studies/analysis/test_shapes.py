from __future__ import annotations

import pytest
import torch

from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
from tnlm.errors import BudgetError
from tnlm.metrics.metric import Metric
from tnlm.studies.analysis.shapes import kronecker_errors


def test_the_planted_shape_has_no_error_and_every_size_is_kept(gaussian):
    weight = sum(torch.kron(gaussian(4, 3, seed=s), gaussian(2, 4, seed=9 + s)) for s in range(2))
    found = kronecker_errors(weight, keep=0.5)
    assert found[2, 4] < 1e-6
    assert min(found, key=found.get) == (2, 4)
    assert all(8 % p == 0 and 12 % q == 0 for p, q in found)
    assert all(0 <= error < 1 for error in found.values())


def test_an_error_is_that_of_the_fit_with_as_many_terms_as_fit(gaussian):
    weight = gaussian(8, 12)
    found = kronecker_errors(weight, keep=0.4)
    for terms in range(1, 9):
        spec = KroneckerSpec(terms, (4, 2), (3, 4))
        if FORMAT.network((8, 12), spec).params > 0.4 * 96:
            break
        (best,) = FORMAT.errors(weight.double(), Metric(), [spec])
    assert found[2, 4] == pytest.approx(best)


def test_more_numbers_never_hurt(gaussian):
    weight = gaussian(6, 8)
    small, large = (kronecker_errors(weight, keep=keep) for keep in (0.3, 0.6))
    assert small.keys() <= large.keys()
    assert all(large[shape] <= error + 1e-12 for shape, error in small.items())


def test_bad_shares_are_refused(gaussian):
    for keep in (0.0, 1.0, -1.0):
        with pytest.raises(BudgetError, match="between 0 and 1"):
            kronecker_errors(gaussian(4, 4), keep=keep)
    with pytest.raises(BudgetError, match="no Kronecker product"):
        kronecker_errors(gaussian(2, 2), keep=0.1)
