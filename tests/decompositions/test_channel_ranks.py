from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.channel_layer import Layer
from tnlm.decompositions.channel_ranks import FORMAT, ChannelRanksSpec, matrix_of
from tnlm.decompositions.channels import FORMAT as CHANNELS
from tnlm.decompositions.channels import ChannelsSpec
from tnlm.errors import OptionError, RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.metrics.stacked import Stacked
from tnlm.tensors.costs import macs

HIDDEN, SIZES, TOKENS = 12, (5, 4, 7), 200
SHAPE = (sum(SIZES), HIDDEN)
OPTIONS = {"sizes": SIZES}


@pytest.fixture(scope="module")
def weight(gaussian):
    return gaussian(*SHAPE, seed=1)


@pytest.fixture(scope="module", params=["two-sided", "inputs", "none"])
def metric(request, gaussian):
    """The metrics of a reader and two producers, correlated, some channels louder than others."""
    loud = torch.linspace(0.2, 2.0, HIDDEN, dtype=torch.float64)

    def side(size, seed, scale=1.0):
        values = gaussian(TOKENS, size, seed=seed) @ gaussian(size, size, seed=seed + 50) * scale
        return Side(values.T @ values / TOKENS)

    if request.param == "none":
        return Stacked([Metric()] * 3, SIZES)
    reader = Metric(inputs=side(HIDDEN, 2, loud))
    inputs = [side(size, 3) for size in SIZES[1:]]
    if request.param == "inputs":
        return Stacked([reader, *(Metric(outputs=each) for each in inputs)], SIZES)
    reader = Metric(side(SIZES[0], 4), reader.inputs)
    return Stacked([reader, *(Metric(each, side(HIDDEN, 5, loud)) for each in inputs)], SIZES)


@st.composite
def specs(draw):
    width = draw(st.integers(1, HIDDEN))
    ranks = tuple(draw(st.integers(1, min(size, width))) for size in SIZES)
    return ChannelRanksSpec(width, ranks, SIZES)


def squared_error(weight, metric, spec):
    """The error of the reader, and that of the producers in the rows they keep."""
    factors = FORMAT.fit(weight, metric, spec)
    kept, tall = factors["kept"], FORMAT.reconstruct(SHAPE, spec, factors)
    error = (weight - tall).split(list(SIZES))
    total = metric.members[0].norm(error[0]) ** 2
    for part, member in zip(error[1:], metric.members[1:], strict=True):
        dropped = torch.ones(HIDDEN, dtype=torch.bool)
        dropped[kept] = False
        total += member.norm(part.masked_fill(dropped, 0.0)) ** 2
    return total


@given(spec=specs())
def test_errors_are_those_of_the_factors(spec, weight, metric):
    [error] = FORMAT.errors(weight, metric, [spec])
    measured = math.sqrt(squared_error(weight, metric, spec)) / metric.norm(weight)
    assert error == pytest.approx(measured, rel=1e-5, abs=1e-6)


@given(width=st.integers(1, HIDDEN))
def test_at_full_ranks_it_is_channels(width, weight, metric):
    spec = ChannelRanksSpec(width, tuple(min(size, width) for size in SIZES), SIZES)
    factors = FORMAT.fit(weight, metric, spec)
    reader = metric.members[0]
    turned = Metric(reader.inputs, reader.outputs)
    alone = CHANNELS.fit(weight[: SIZES[0]].T, turned, ChannelsSpec(width))
    assert torch.equal(factors["kept"], alone["kept"])
    torch.testing.assert_close(factors["whole0"], alone["rows"].T)
    for index, producer in enumerate(weight[SIZES[0] :].split(SIZES[1:])):
        assert torch.equal(factors[f"whole{index + 1}"], producer.T[alone["kept"]])
    assert FORMAT.network(SHAPE, spec).params == SIZES[0] * width
    if width == HIDDEN:
        assert FORMAT.errors(weight, metric, [spec])[0] < 1e-5


@given(spec=specs())
def test_every_matrix_is_the_best_of_its_rank(spec, weight, metric):
    factors = FORMAT.fit(weight, metric, spec)
    layer = Layer.of(weight, metric, SIZES)
    for index, (part, measured) in enumerate(layer.narrowed(factors["kept"])):
        left, right = measured.low_rank(part, spec.ranks[index])
        best = measured.norm(part - left @ right)
        found = measured.norm(part - matrix_of(factors, index))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_the_curve_has_the_errors_of_its_specs(weight, metric):
    curve = FORMAT.curve(weight, metric, OPTIONS, math.inf)
    assert len({spec for spec, _ in curve}) > 20
    errors = FORMAT.errors(weight, metric, [spec for spec, _ in curve])
    assert [error for _, error in curve] == pytest.approx(errors, rel=1e-6, abs=1e-7)
    assert {HIDDEN, 4} <= {spec.width for spec, _ in curve}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_curve_is_at_least_as_good_as_channels_alone(share, weight, metric):
    most = share * math.prod(SHAPE)
    curve = FORMAT.curve(weight, metric, OPTIONS, math.inf)
    found = min(error for spec, error in curve if params(spec) <= most)
    width = int(most // sum(SIZES))
    plain = ChannelRanksSpec(width, tuple(min(size, width) for size in SIZES), SIZES)
    assert found <= FORMAT.errors(weight, metric, [plain])[0] * (1 + 1e-9)


def params(spec):
    network = FORMAT.network(SHAPE, spec)
    return sum(each.params for each in network.together)


@given(keep=st.floats(0.05, 1.0), gauge=st.booleans())
def test_candidates_are_within_the_ceiling(keep, gauge, weight):
    ceiling = Ceiling(keep * math.prod(SHAPE), math.prod(SHAPE))
    found = FORMAT.candidates(SHAPE, {**OPTIONS, "gauge": gauge}, ceiling)
    for spec in found:
        network = FORMAT.network(SHAPE, spec)
        each = network.together
        assert params(spec) <= ceiling.params
        assert sum(macs(one) for one in each) <= ceiling.macs
        assert all(one.gauge is None for one in each) or gauge
    assert found or keep < 0.4


def test_sizes_that_are_given_are_taken(weight, metric):
    asked = {**OPTIONS, "width": 6, "ranks": (2, 3, 6)}
    spec = ChannelRanksSpec(6, (2, 3, 6), SIZES)
    assert FORMAT.candidates(SHAPE, asked, Ceiling()) == [spec]
    assert [each for each, _ in FORMAT.curve(weight, metric, asked, math.inf)] == [spec]
    narrow = FORMAT.curve(weight, metric, {**OPTIONS, "width": 6}, math.inf)
    assert {each.width for each, _ in narrow} == {6}


def test_a_tolerance_gives_the_smallest_size_within_it(weight, metric):
    [spec] = FORMAT.within(weight, metric, OPTIONS, 0.6)
    assert FORMAT.errors(weight, metric, [spec])[0] <= 0.6
    curve = FORMAT.curve(weight, metric, OPTIONS, math.inf)
    assert params(spec) == min(params(each) for each, error in curve if error <= 0.6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ChannelRanksSpec(13, (1, 1, 1), SIZES), "width=13; 12 channels allow 1 to 12"),
        (ChannelRanksSpec(6, (1, 1), SIZES), r"ranks=\(1, 1\); allowed: 3 ranks"),
        (ChannelRanksSpec(6, (6, 1, 1), SIZES), "rank=6; a 5x6 matrix allows 1 to 5"),
    ],
)
def test_impossible_sizes_are_errors(spec, words):
    with pytest.raises(RankError, match=words):
        FORMAT.network(SHAPE, spec)


def test_a_metric_of_other_matrices_is_an_error(weight):
    with pytest.raises(OptionError, match="metric of every matrix"):
        FORMAT.curve(weight, Stacked([Metric()] * 2, (9, 7)), OPTIONS, math.inf)
