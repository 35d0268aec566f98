"""What differs by rounding alone does not decide: the first of equal choices is taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnlm
from tnlm.decompositions import get_format
from tnlm.schemes import get_scheme
from tnlm.utils.ties import EXACT, greatest, least, significant

NOISE = [-2e-16, -1e-16, 0.0, 1e-16, 2e-16]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_the_least_is_least(values):
    found = values[least(values)]
    assert found <= min(values) * (1 + 1e-9)
    assert least(values) <= values.index(min(values))


@given(st.permutations(NOISE))
def test_noise_does_not_decide(noise):
    assert least([0.9, *(0.4 + n for n in noise)]) == 1
    assert len({significant(0.4 + n) for n in noise}) == 1
    gains = torch.tensor([0.1, *(0.4 + n for n in noise), 0.7], dtype=torch.float64)
    assert greatest(gains, 4).tolist() == [6, 1, 2, 3]


def test_what_is_no_tie_is_chosen_as_before():
    assert least([0.4 + 1e-6, 0.4]) == 1
    assert least([math.inf, 0.5, math.inf]) == 1
    assert least([math.inf, math.inf]) == 0
    assert least([1e-5, 0.9e-5], EXACT) == 1
    values = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(greatest(values, 9), values.topk(9).indices)


def test_zeros_and_what_is_taken_come_last():
    gains = torch.tensor([0.0, -1.0, 1e-30, 0.0, 2.0], dtype=torch.float64)
    assert greatest(gains, 4).tolist() == [4, 2, 0, 3]


@pytest.mark.parametrize("scheme", ["tucker", "kron", "tt", "tr", "btt"])
def test_errors_that_agree_choose_the_same_split(scheme, make_model, monkeypatch):
    """As with another number of threads, on which sums differ in the last place."""
    plans = []
    for sign in (-1, 1):
        structure = get_format(get_scheme(scheme).formats[0])
        errors = type(structure).errors

        def close(self, weight, metric, specs, errors=errors, sign=sign):
            found = errors(self, weight, metric, specs)
            return [e if math.isinf(e) else 0.5 + sign * k * 1e-16 for k, e in enumerate(found)]

        with monkeypatch.context() as patch:
            patch.setattr(type(structure), "errors", close)
            options = {"targets": ["q_proj", "up_proj"], "keep_targets": 0.6, "progress": False}
            plan = tnlm.plan(make_model("llama"), scheme, **options)
        plans.append([layer.spec for layer in plan.layers])
    assert plans[0] == plans[1]
