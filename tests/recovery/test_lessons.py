import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.recovery.lessons import Weights, logit_loss, map_loss, preset_weights, state_loss

SEEDS = st.integers(0, 10_000)


def tensors(*shape, seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@given(SEEDS, st.floats(0.5, 8))
def test_logits_are_compared_by_the_formula(seed, temperature):
    student, teacher = tensors(2, 3, 7, seed=seed)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    found = logit_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(found) > 0
    assert float(logit_loss(student, student, temperature=temperature)) == 0
    # A constant added to all logits says nothing.
    assert abs(float(logit_loss(student, student + 3, temperature=temperature))) < 1e-4


@given(SEEDS)
def test_states_are_compared_relative_to_the_teacher(seed):
    student, teacher = tensors(2, 3, 5, seed=seed)
    mask = torch.ones(2, 3)
    found = state_loss(student, teacher, mask)
    wanted = (student - teacher).square().sum() / teacher.square().sum()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state_loss(5 * student, 5 * teacher, mask), found)
    assert float(state_loss(teacher, teacher, mask)) == 0


@given(SEEDS)
def test_maps_are_compared_by_the_formula(seed):
    student, teacher = (x.log_softmax(-1) for x in tensors(2, 4, 3, 3, seed=seed))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    rows = (teacher.exp() * (teacher - student)).sum(-1)
    wanted = (rows[0].sum() + rows[1, :, 0].sum()) / (4 * 4)
    torch.testing.assert_close(map_loss(student, teacher, mask), wanted, rtol=1e-4, atol=1e-6)
    assert float(map_loss(student, student, mask)) == 0


@given(SEEDS)
def test_padding_does_not_count(seed):
    student, teacher = tensors(2, 3, 5, seed=seed)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for loss in (logit_loss, state_loss):
        found = loss(student, teacher, mask)
        other = student.clone()
        other[1, 2] = 100.0
        assert torch.equal(loss(other, teacher, mask), found)


@pytest.mark.parametrize("nothing", [float("-inf"), torch.finfo(torch.float32).min])
def test_what_both_rule_out_does_not_count(nothing):
    student, teacher = tensors(1, 2, 3, 3, seed=0)
    for x in (student, teacher):
        x[..., 2] = nothing
    student.requires_grad_(True)
    logs = student.log_softmax(-1)
    found = map_loss(logs, teacher.log_softmax(-1), torch.ones(1, 3))
    wanted = map_loss(
        student[..., :2].log_softmax(-1), teacher[..., :2].log_softmax(-1), torch.ones(1, 3)
    )
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert bool(student.grad.isfinite().all())
    assert bool(logit_loss(student, teacher).isfinite())


def test_a_teacher_in_half_precision_is_compared_in_full():
    (x,) = tensors(1, 2, 5, seed=0, count=1)
    half = x.bfloat16()
    for loss in (logit_loss, state_loss):
        assert loss(half.float(), half, torch.ones(1, 2)).dtype == torch.float32
        assert float(loss(half.float(), half, torch.ones(1, 2))) == 0


def test_a_silent_teacher_gives_a_finite_loss():
    assert bool(state_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2)) == 0)


def test_presets():
    assert preset_weights(None) == Weights(logits=1.0)
    assert preset_weights(None, hidden=2.0) == Weights(logits=1.0, hidden=2.0)
    ilkd = preset_weights("ilkd")
    assert (ilkd.embedding, ilkd.attention, ilkd.hidden, ilkd.labels, ilkd.logits) == (
        1,
        1,
        1,
        1,
        0,
    )
    assert preset_weights("ilkd", logits=0.5, labels=None).logits == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "ilk"}, "did you mean 'ilkd'"),
        ({"preset": None, "hidden": -1.0}, "hidden=-1.0"),
        ({"preset": None, "hidden": float("nan")}, "hidden=nan"),
        ({"preset": None, "logits": 0.0}, "all weights are 0"),
    ],
)
def test_weights_are_checked(arguments, message):
    with pytest.raises(OptionError, match=message):
        preset_weights(**arguments)
