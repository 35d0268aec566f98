"""Experts as a format: which of them stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.experts import FORMAT, ExpertsSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

weights = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=9)


@given(weights)
def test_the_error_is_what_was_dropped(costs):
    costs = torch.tensor(costs).double()
    metric, ones = Metric(outputs=Side(costs)), torch.ones(len(costs), 1)
    curve = FORMAT.curve(ones, metric, {}, 0.0)
    assert [spec.experts for spec, _ in curve] == list(range(1, len(costs)))
    for spec, error in curve:
        gone = costs.sort().values[: len(costs) - spec.experts].sum() / costs.sum()
        assert error**2 == pytest.approx(float(gone), rel=1e-6, abs=1e-12)
        kept = FORMAT.fit(ones, metric, spec)["kept"]
        assert kept.tolist() == sorted(kept.tolist())
        assert len(kept) == spec.experts


def test_at_least_so_many_stay():
    assert FORMAT.candidates((8, 1), {}, Ceiling(4, least=2)) == [ExpertsSpec(4)]
    assert FORMAT.candidates((8, 1), {}, Ceiling(1, least=2)) == []
    assert FORMAT.candidates((8, 1), {"experts": 3}, Ceiling(4, least=2)) == [ExpertsSpec(3)]
    assert FORMAT.candidates((8, 1), {"experts": 5}, Ceiling(4, least=2)) == []


def test_more_experts_than_there_are_is_an_error():
    with pytest.raises(RankError, match="8 experts allow 1 to 8"):
        FORMAT.network((8, 1), ExpertsSpec(9))


def test_the_fewest_within_a_tolerance_are_found():
    metric = Metric(outputs=Side(torch.tensor([1.0, 8.0, 0.0, 91.0])))
    ones = torch.ones(4, 1)
    assert FORMAT.within(ones, metric, {}, 0.3) == [ExpertsSpec(1)]
    assert FORMAT.within(ones, metric, {}, 0.2) == [ExpertsSpec(2)]
    assert FORMAT.within(ones, metric, {}, 0.0) == [ExpertsSpec(3)]
