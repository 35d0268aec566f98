from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.metrics.metric import Elementwise, Metric
from tnlm.metrics.several import Several
from tnlm.metrics.sides import Side
from tnlm.metrics.stacked import Stacked

seeds = st.integers(0, 20)
HEIGHT, WIDTH = 4, 6


def moment(gaussian, size, seed):
    x = gaussian(3 * size, size, seed=seed)
    return x.T @ x / len(x)


def metrics(gaussian, seed, count=3, *, shared=False, outputs=True):
    """Metrics of slices; with ``shared`` all have the same sides, with scales that differ."""
    found = []
    for index in range(count):
        at = 10 * seed + (0 if shared else index)
        inputs = Side(moment(gaussian, WIDTH, at) * (1.0 if shared else 1 + index))
        form = Side(moment(gaussian, HEIGHT, at + 1) * (1 + index)) if outputs else None
        found.append(Metric(form, inputs))
    return found


@given(seed=seeds, outputs=st.booleans())
def test_it_is_the_sum_over_the_members(seed, outputs, gaussian):
    members = metrics(gaussian, seed, outputs=outputs)
    stacked = Stacked(members, [HEIGHT] * 3)
    error = gaussian(3 * HEIGHT, WIDTH, seed=seed)
    parts = error.split(HEIGHT)
    total = sum(member.norm(part) ** 2 for member, part in zip(members, parts, strict=True))
    assert stacked.norm(error) ** 2 == pytest.approx(total)
    assert float(stacked.whiten(error).norm()) ** 2 == pytest.approx(total)
    pulled = torch.cat([m.pull(part) for m, part in zip(members, parts, strict=True)])
    torch.testing.assert_close(stacked.pull(error), pulled)


@given(seed=seeds, outputs=st.booleans())
def test_with_shared_inputs_it_starts_from_itself(seed, outputs, gaussian):
    inputs = Side(moment(gaussian, WIDTH, seed))
    forms = [Side(moment(gaussian, HEIGHT, seed + k)) if outputs else None for k in range(3)]
    stacked = Stacked([Metric(form, inputs) for form in forms], [HEIGHT] * 3)
    error = gaussian(3 * HEIGHT, WIDTH, seed=seed)
    assert stacked.start().norm(error) == pytest.approx(stacked.norm(error))


@given(seed=seeds)
def test_whitening_by_modes_is_exact_where_members_differ_by_a_scale(seed, gaussian):
    stacked = Stacked(metrics(gaussian, seed, shared=True), [HEIGHT] * 3)
    slices, rows, columns = (side.values for side in stacked.modes((3, HEIGHT), (WIDTH,)))
    whole = Metric(Side(torch.kron(slices, rows)), Side(columns))
    error = gaussian(3 * HEIGHT, WIDTH, seed=seed)
    assert whole.norm(error) == pytest.approx(stacked.norm(error), rel=1e-6)


@given(seed=seeds, outputs=st.booleans())
def test_modes_are_the_partial_traces_of_the_whole_form(seed, outputs, gaussian):
    members = metrics(gaussian, seed, outputs=outputs)
    stacked = Stacked(members, [HEIGHT] * 3)
    wanted = Metric.modes(stacked, (3, HEIGHT), (WIDTH,))
    for found, side in zip(stacked.modes((3, HEIGHT), (WIDTH,)), wanted, strict=True):
        torch.testing.assert_close(found.values, side.values)


def test_slices_of_a_member_count_one_by_one(gaussian):
    tall = Metric(Side(moment(gaussian, 2 * HEIGHT, 1)), Side(moment(gaussian, WIDTH, 2)))
    low = Metric(Side(moment(gaussian, HEIGHT, 3)), tall.inputs)
    stacked = Stacked([tall, low], [2 * HEIGHT, HEIGHT])
    wanted = Metric.modes(stacked, (3, HEIGHT), (WIDTH,))
    for found, side in zip(stacked.modes((3, HEIGHT), (WIDTH,)), wanted, strict=True):
        torch.testing.assert_close(found.values, side.values)


def test_without_sides_it_is_the_frobenius_norm(gaussian):
    stacked = Stacked([Metric(), Metric()], [HEIGHT] * 2)
    error = gaussian(2 * HEIGHT, WIDTH)
    assert stacked.norm(error) == pytest.approx(float(error.norm()))
    assert stacked.modes((2, HEIGHT), (WIDTH,)) == [None] * 3


def test_forms_may_be_diagonal_or_missing(gaussian):
    members = [Metric(), Metric(Side(torch.ones(HEIGHT) * 2), Side(torch.ones(WIDTH) * 3))]
    stacked = Stacked(members, [HEIGHT] * 2)
    slices, rows, columns = stacked.modes((2, HEIGHT), (WIDTH,))
    torch.testing.assert_close(slices.values, torch.tensor([1.0, 6.0]).double())
    torch.testing.assert_close(rows.values, torch.ones(HEIGHT).double())
    torch.testing.assert_close(columns.values, torch.ones(WIDTH).double())


@pytest.mark.parametrize(
    "member", [Elementwise(torch.ones(HEIGHT, WIDTH)), Metric(mean=torch.ones(WIDTH))]
)
def test_members_must_be_separable_and_add_no_bias(member):
    with pytest.raises(OptionError, match="allowed: separable"):
        Stacked([member], [HEIGHT])


@given(seed=seeds, outputs=st.booleans(), scales=st.tuples(*3 * [st.floats(0.1, 10)]))
def test_several_matrices_one_below_the_other_have_the_same_norm(seed, outputs, scales, gaussian):
    members = [*metrics(gaussian, seed, 2, outputs=outputs), Metric()]
    several = Several([lambda m=m: m for m in members], scales)
    error = gaussian(3 * HEIGHT, WIDTH, seed=seed)
    stacked = Stacked.of(several, HEIGHT)
    assert stacked.norm(error) == pytest.approx(several.norm(error.reshape(3, HEIGHT, WIDTH)))


def test_what_does_not_count_has_the_least_weight(gaussian):
    members = metrics(gaussian, 0, 2)
    several = Several([lambda m=m: m for m in members], [1.0, 0.0])
    error = gaussian(2 * HEIGHT, WIDTH)
    stacked = Stacked.of(several, HEIGHT)
    assert 0 < stacked.members[1].norm(error[HEIGHT:]) < 1e-3 * stacked.norm(error)
    assert stacked.norm(error) == pytest.approx(members[0].norm(error[:HEIGHT]))
