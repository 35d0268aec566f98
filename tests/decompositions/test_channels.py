from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Ceiling, Format
from tnlm.decompositions.channels import FORMAT, ChannelsSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

HIDDEN, OUT, TOKENS = 12, 5, 200


@pytest.fixture(scope="module")
def hidden(gaussian):
    """Correlated activations, (tokens, hidden), some channels louder than others."""
    mixed = gaussian(TOKENS, HIDDEN, seed=1) @ gaussian(HIDDEN, HIDDEN, seed=2)
    return mixed * torch.linspace(0.2, 2.0, HIDDEN, dtype=torch.float64)


@pytest.fixture(scope="module")
def weight(gaussian):
    return gaussian(HIDDEN, OUT, seed=3)


def on(hidden, outputs=None):
    """The metric of activations: the error of what the projection gives on them."""
    moment = Side(hidden.T @ hidden / len(hidden))
    return Metric(inputs=None if outputs is None else Side(outputs), outputs=moment)


def fit(weight, metric, width):
    factors = FORMAT.fit(weight, metric, ChannelsSpec(width))
    return factors["kept"], factors["rows"]


@given(width=st.integers(1, HIDDEN), two_sided=st.booleans())
def test_rows_are_the_least_squares_on_the_activations(width, two_sided, hidden, weight, gaussian):
    root = gaussian(OUT, OUT, seed=4)
    metric = on(hidden, root @ root.T if two_sided else None)
    kept, rows = fit(weight, metric, width)
    best = torch.linalg.lstsq(hidden[:, kept], hidden @ weight).solution
    torch.testing.assert_close(rows, best, atol=1e-6, rtol=1e-6)
    rebuilt = FORMAT.reconstruct((HIDDEN, OUT), ChannelsSpec(width), {"kept": kept, "rows": rows})
    assert float(metric.pull(weight - rebuilt)[kept].norm()) < 1e-6  # the gradient for the rows
    left = torch.ones(HIDDEN, dtype=torch.bool)
    left[kept] = False
    assert not rebuilt[left].any()
    assert torch.equal(rebuilt[kept], rows)


@given(two_sided=st.booleans(), steps=st.sampled_from([3, 5, 128]))
def test_the_path_is_the_measured_error_and_falls(two_sided, steps, hidden, weight, gaussian):
    root = gaussian(OUT, OUT, seed=4)
    metric = on(hidden, root @ root.T if two_sided else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnlm.decompositions.channels.STEPS", steps)
        curve = FORMAT.curve(weight, metric, {}, float("inf"))
        specs = [spec for spec, _ in curve]
        measured = Format.errors(FORMAT, weight, metric, specs)
        assert FORMAT.errors(weight, metric, specs) == pytest.approx(measured, abs=1e-6)
    errors = [error for _, error in curve]
    assert errors == pytest.approx(measured, abs=1e-5)
    assert errors == sorted(errors, reverse=True)
    assert curve[-1][0].width == HIDDEN
    assert errors[-1] < 1e-5
    assert len(curve) == min(HIDDEN, -(-HIDDEN // -(-HIDDEN // steps)))


def test_errors_between_steps_are_measured(hidden, weight, monkeypatch):
    monkeypatch.setattr("tnlm.decompositions.channels.STEPS", 4)  # of three channels each
    specs = [ChannelsSpec(width) for width in (2, 6, 7)] + [ChannelsSpec(4, 2)]
    found = FORMAT.errors(weight, on(hidden), specs)
    assert found == pytest.approx(Format.errors(FORMAT, weight, on(hidden), specs), rel=1e-9)


def test_every_step_takes_the_channel_that_helps_most(hidden, weight):
    metric, taken = on(hidden), []
    for width in range(1, HIDDEN + 1):
        left = {
            channel: float(
                (
                    hidden @ weight
                    - hidden[:, [*taken, channel]]
                    @ torch.linalg.lstsq(hidden[:, [*taken, channel]], hidden @ weight).solution
                ).norm()
            )
            for channel in set(range(HIDDEN)) - set(taken)
        }
        taken.append(min(left, key=left.__getitem__))
        kept, _ = fit(weight, metric, width)
        assert kept.tolist() == sorted(taken)


def test_without_data_the_rows_of_least_norm_go(weight):
    kept, rows = fit(weight, Metric(), 7)
    assert kept.tolist() == weight.norm(dim=1).topk(7).indices.sort().values.tolist()
    torch.testing.assert_close(rows, weight[kept])


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_copies_of_channels_go_at_no_cost(scale, hidden, weight):
    copied = torch.cat([hidden, scale * hidden], dim=1)
    double = torch.cat([weight, weight.flip(0)])
    metric = on(copied)
    [error] = FORMAT.errors(double, metric, [ChannelsSpec(HIDDEN)])
    assert error < 1e-5
    kept, _ = fit(double, metric, HIDDEN)
    assert sorted(channel % HIDDEN for channel in kept.tolist()) == list(range(HIDDEN))


def test_channels_that_never_act_go_first(hidden, weight):
    dead = hidden.clone()
    dead[:, [2, 7, 8]] = 0.0
    loud = weight.clone()
    loud[[2, 7, 8]] = 1e3
    kept, rows = fit(loud, on(dead), HIDDEN - 3)
    assert not {2, 7, 8} & set(kept.tolist())
    torch.testing.assert_close(rows, loud[kept], atol=1e-6, rtol=1e-6)
    [error] = FORMAT.errors(loud, on(dead), [ChannelsSpec(HIDDEN - 3)])
    assert error < 1e-5


def test_outputs_that_do_not_matter_keep_no_channel(hidden, weight):
    split = weight.clone()
    split[:6, 1:], split[6:, 0] = 0.0, 0.0  # the first half of the channels serves output 0 only
    apart = torch.diag(hidden.square().mean(0))
    only_first = torch.diag(torch.tensor([1.0, 0, 0, 0, 0]))
    metric = Metric(Side(apart), Side(only_first))
    assert fit(split, metric, 6)[0].tolist() == list(range(6))


def test_silence_and_zero_weights_do_no_harm(weight):
    silent = Metric(outputs=Side(torch.zeros(HIDDEN, HIDDEN)))
    for given_weight, metric in ((weight, silent), (torch.zeros(HIDDEN, OUT), Metric())):
        kept, rows = fit(given_weight, metric, 4)
        assert len(set(kept.tolist())) == 4
        assert rows.isfinite().all()
    assert FORMAT.errors(torch.zeros(HIDDEN, OUT), Metric(), [ChannelsSpec(4)]) == [0.0]


def test_a_full_width_changes_nothing(hidden, weight):
    kept, rows = fit(weight, on(hidden), HIDDEN)
    assert kept.tolist() == list(range(HIDDEN))
    torch.testing.assert_close(rows, weight, atol=1e-6, rtol=1e-6)


@given(tolerance=st.floats(0.01, 0.9))
def test_a_tolerance_is_met_with_no_channel_to_spare(tolerance, hidden, weight):
    metric = on(hidden)
    [spec] = FORMAT.within(weight, metric, {}, tolerance)
    few = [ChannelsSpec(width) for width in range(max(spec.width - 1, 1), spec.width + 1)]
    errors = FORMAT.errors(weight, metric, few)
    assert errors[-1] <= tolerance + 1e-9
    assert len(few) == 1 or errors[0] > tolerance


def test_candidates_are_the_largest_width_or_the_one_asked_for():
    assert FORMAT.candidates((12, 5), {}, Ceiling(34)) == [ChannelsSpec(6)]
    assert FORMAT.candidates((12, 5), {}, Ceiling(34, macs=20)) == [ChannelsSpec(4)]
    assert FORMAT.candidates((12, 5), {}, Ceiling()) == [ChannelsSpec(12)]
    assert FORMAT.candidates((12, 5), {"width": 3}, Ceiling(34)) == [ChannelsSpec(3)]
    assert FORMAT.candidates((12, 5), {"width": 7}, Ceiling(34)) == []
    assert FORMAT.candidates((12, 5), {}, Ceiling(4)) == []
    assert FORMAT.curve(torch.ones(12, 5), Metric(), {"width": 3}, 1e9)[0][0] == ChannelsSpec(3)


def test_more_channels_than_there_are_are_refused():
    with pytest.raises(RankError, match="width=13; 12 channels allow 1 to 12"):
        FORMAT.network((12, 5), ChannelsSpec(13))


def test_fits_repeat_and_leave_the_weight(hidden, weight):
    before, metric = weight.clone(), on(hidden)
    moment = metric.outputs.values.clone()
    first, second = (FORMAT.fit(weight, metric, ChannelsSpec(5)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, before)
    assert torch.equal(metric.outputs.values, moment)
