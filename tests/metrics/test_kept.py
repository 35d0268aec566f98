"""What a metric keeps of the last weight: never stale, and not part of what is pickled."""

from __future__ import annotations

import pickle

import pytest
import torch

from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side


def second_moment(size, gaussian):
    x = gaussian(9, size, seed=size)
    return x.T @ x / 9


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_weight_that_was_changed_without_a_trace_is_measured_anew(shape, gaussian):
    metric = Metric(*(Side(second_moment(size, gaussian)) for size in shape))
    weight = gaussian(*shape, seed=1)
    for change in (weight.data.mul_, lambda by: weight.numpy().__imul__(by)):
        before = metric.norm(weight)
        change(2.0)
        assert metric.norm(weight) == pytest.approx(2.0 * before)
    before = metric.norm(weight)
    weight.data = 3.0 * weight.data
    assert metric.norm(weight) == pytest.approx(3.0 * before)


def test_a_metric_that_was_used_is_pickled_without_what_it_keeps(gaussian):
    metric, weight = Metric(inputs=Side(second_moment(4, gaussian))), gaussian(3, 4, seed=2)
    size = len(pickle.dumps(metric))
    gram = metric.gram(weight)
    held = pickle.dumps(metric)
    assert len(held) == size
    assert torch.equal(pickle.loads(held).gram(weight), gram)


def test_the_product_of_the_last_weight_is_kept(gaussian, monkeypatch):
    metric, weight = Metric(inputs=Side(second_moment(4, gaussian))), gaussian(3, 4, seed=2)
    gram, calls = metric.gram(weight), []
    monkeypatch.setattr(Side, "apply", lambda *_: calls.append(1))
    assert torch.equal(metric.gram(weight.clone()), gram)
    assert not calls
