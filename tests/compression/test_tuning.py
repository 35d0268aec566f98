from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.calibration.states import States
from tnlm.compression.tuning import BlockTask, _sizes, rate, split_windows, tune
from tnlm.errors import CalibrationError

CALL = ((), {})


def block_task(windows=16, seed=0, name="block"):
    """A matrix that should become another one, on windows of 4 tokens."""
    torch.manual_seed(seed)
    student, teacher = nn.Linear(6, 6), nn.Linear(6, 6)
    inputs = [torch.randn(1, 4, 6) for _ in range(windows)]
    with torch.no_grad():
        wanted = [teacher(x) for x in inputs]
    return BlockTask(name, student, CALL, States(student, inputs), States(student, wanted))


def parameters(each, dtype=torch.float32):
    return dict.fromkeys(each.student.parameters(), dtype)


@pytest.mark.parametrize(
    ("windows", "held"), [(1, [0]), (2, [1]), (7, [6]), (8, [7]), (16, [7, 15]), (20, [7, 15])]
)
def test_every_eighth_window_is_held_out(windows, held):
    learned, found = split_windows(windows)
    assert found == held
    if windows > 1:
        assert sorted(learned + found) == list(range(windows))
    else:
        assert learned == found


@pytest.mark.parametrize(
    ("windows", "learned", "expected"),
    [
        (25 * 256, 256, (200, 32)),  # the published training, without windows held out
        (25 * 224, 224, (200, 28)),
        (25 * 56, 56, (200, 7)),
        (32, 56, (32, 1)),
        (0.1, 7, (1, 1)),
        (4000, 7, (571, 7)),  # no window twice in a step
    ],
)
def test_there_are_about_as_many_steps_as_published(windows, learned, expected):
    assert _sizes(windows, range(learned)) == expected


def test_the_rate_rises_and_falls_to_a_tenth():
    rates = [rate(step, 200) for step in range(201)]
    assert rates[19] == max(rates) == 1
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[200] == pytest.approx(0.1)
    assert rate(0, 1) == 1


def test_the_error_on_windows_not_trained_on_falls():
    each = block_task()
    before = each.error([7, 15])
    gain = tune(each, parameters(each), 4 * 800, learning_rate=1e-2)
    assert gain.before == before
    assert gain.kept
    assert gain.after == each.error([7, 15]) < 0.9 * before


@pytest.mark.parametrize("learning_rate", [1e2, float("inf")])
def test_what_does_not_help_is_undone(learning_rate):
    each = block_task()
    start = [p.detach().clone() for p in each.student.parameters()]
    gain = tune(each, parameters(each), 4 * 20, learning_rate=learning_rate)
    assert not gain.kept
    assert gain.after == gain.before == each.error([7, 15])
    assert all(map(torch.equal, start, each.student.parameters()))
    assert all(p.grad is None for p in each.student.parameters())


def test_the_error_is_that_of_the_values_as_stored():
    each = block_task()
    with torch.no_grad():
        for parameter in each.student.parameters():
            parameter.copy_(parameter.bfloat16())
    gain = tune(each, parameters(each, torch.bfloat16), 4 * 800, learning_rate=1e-2)
    assert gain.kept
    for parameter in each.student.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
    assert gain.after == each.error([7, 15])


def test_the_seed_alone_decides():
    found = []
    for seed in (0, 0, 1):
        each = block_task()
        tune(each, parameters(each), 4 * 100, learning_rate=1e-2, seed=seed)
        found.append(each.student.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_output_that_is_not_finite_is_named():
    each = block_task(name="model.layers.3")
    each.wanted[7] = each.wanted[7] * torch.inf
    with pytest.raises(CalibrationError, match=r"output of model\.layers\.3 is not finite"):
        tune(each, parameters(each), 4)
