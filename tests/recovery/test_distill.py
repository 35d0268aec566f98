"""Distillation: every term is zero at the teacher, counts no padding, and is learnt from."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertForSequenceClassification

import tnlm
from tnlm.errors import ModelError, OptionError, TrainingError
from tnlm.recovery import lessons, training
from tnlm.recovery.distill import distill

DATA = torch.arange(512) * 7 % 61 + 3
TERMS = ("logits", "hidden", "attention", "embedding")
FAST = {"max_length": 16, "batch_size": 4, "learning_rate": 3e-3, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture
def logged(monkeypatch):
    """Collect what a Distiller logs."""
    found: dict[str, list[float]] = {}
    original = training.SteadyTrainer.__init__

    def watched(self, **arguments):
        original(self, **arguments)
        self.logged = found

    monkeypatch.setattr(training.SteadyTrainer, "__init__", watched)
    return found


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_zero_at_the_teacher_and_falls_elsewhere(kind, term, compressed, logged):
    student, teacher = compressed(kind, "svd"), compressed(kind, "svd")
    without_dropout(student)
    distill(student, teacher, DATA, tokens=64, weights={term: 1.0}, **FAST)
    assert abs(logged[term][0]) < 1e-6
    for values in logged.values():
        values.clear()
    other = compressed(kind, "tensorgpt" if term == "embedding" else "kron")
    without_dropout(other)
    distill(other, teacher, DATA, tokens=8192, weights={term: 1.0}, **FAST)
    assert logged.keys() == {term}
    assert logged[term][0] > 1e-6
    assert sum(logged[term][-4:]) < sum(logged[term][:4])


def test_several_terms_are_logged_with_their_weights(compressed, make_model, logged):
    distill(compressed("llama", "svd"), make_model("llama"), DATA, tokens=64, preset="ilkd", **FAST)
    assert logged.keys() == {"hidden", "attention", "embedding", "labels"}
    single = {name: values[0] for name, values in logged.items()}
    logged.clear()
    weights = {"hidden": 0.5, "labels": 2.0}
    student = compressed("llama", "svd")
    distill(student, make_model("llama"), DATA, tokens=64, weights=weights, **FAST)
    for name, weight in weights.items():
        assert logged[name][0] == pytest.approx(weight * single[name], rel=1e-4)


def test_models_are_left_as_they_were_but_for_the_weights(compressed, make_model):
    student, teacher = compressed("llama", "svd"), make_model("llama")
    before = copy.deepcopy(teacher.state_dict())
    kernels = [m.config._attn_implementation for m in (student, teacher)]
    distill(student, teacher, DATA, tokens=64, preset="ilkd", **FAST)
    assert [m.config._attn_implementation for m in (student, teacher)] == kernels
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_may_be_of_lower_precision(compressed, make_model, logged):
    teacher = make_model("llama").to(torch.bfloat16)
    distill(compressed("llama", "svd"), teacher, DATA, tokens=64, preset="ilkd", **FAST)
    assert all(torch.tensor(values).isfinite().all() for values in logged.values())


def test_a_classifier_learns_from_its_teacher(make_model, logged):
    config = make_model("bert").config
    config.num_labels = 3
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(config).eval()
    student = tnlm.compress(copy.deepcopy(teacher), "svd", keep_targets=0.3, progress=False)
    rows = [{"input_ids": [3 + i, 20, 9][: 2 + i % 2], "labels": i % 3} for i in range(24)]
    distill(student, teacher, rows, epochs=8, **FAST)
    assert sum(logged["logits"][-4:]) < sum(logged["logits"][:4])


@given(seed=st.integers(0, 99), length=st.integers(1, 5), padding=st.integers(0, 4))
def test_padding_changes_no_distance(seed, length, padding):
    generator = torch.Generator().manual_seed(seed)
    whole = length + padding
    seen = torch.arange(whole)[None] < length

    def draw(*shape):
        return [torch.randn(*shape, generator=generator) for _ in range(2)]

    ours, theirs = draw(1, whole, 7)
    found = lessons.logits(ours, theirs, seen, 2.0)
    torch.testing.assert_close(
        found, lessons.logits(ours[:, :length], theirs[:, :length], seen[:, :length], 2.0)
    )
    assert found > 0
    found = lessons.outputs([ours], [theirs], seen)
    torch.testing.assert_close(
        found, lessons.outputs([ours[:, :length]], [theirs[:, :length]], seen[:, :length])
    )
    ours, theirs = (x.softmax(-1) for x in draw(1, 2, whole, whole))
    found = lessons.maps([ours], [theirs], seen)
    torch.testing.assert_close(
        found, lessons.maps([ours[:, :, :length]], [theirs[:, :, :length]], seen[:, :length])
    )
    assert found >= 0


def test_the_gradient_of_soft_predictions_keeps_its_size():
    ours = torch.zeros(1, 1, 3, requires_grad=True)
    theirs = torch.tensor([[[0.01, 0.0, -0.01]]])
    sizes = []
    for temperature in (1.0, 10.0):
        lessons.logits(ours, theirs, torch.ones(1, 1).bool(), temperature).backward()
        sizes.append(float(ours.grad.norm()))
        ours.grad = None
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_a_loss_that_is_not_finite_stops(compressed, make_model):
    teacher = make_model("llama")
    teacher.model.norm.weight.data[0] = torch.nan
    with pytest.raises(TrainingError, match=r"step 0 is not finite \(logits nan\)"):
        distill(compressed("llama", "svd"), teacher, DATA, tokens=64, **FAST)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "logit"}, "preset='logit'; did you mean 'logits'"),
        ({"weights": {"hiden": 1.0}}, "unknown term 'hiden'; did you mean 'hidden'"),
        ({"weights": {"hidden": -1.0}}, "hidden=-1.0; allowed"),
        ({"weights": {}}, "every term has weight 0"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_unknown_terms_are_refused(wrong, message, compressed, make_model):
    with pytest.raises(OptionError, match=message):
        distill(compressed("llama", "svd"), make_model("llama"), DATA, **FAST, **wrong)


def test_models_that_do_not_match_are_refused(compressed, tiny_llama):
    student = compressed("llama", "svd")
    for name, value, weights in [
        ("vocab_size", 70, {"logits": 1.0}),
        ("num_hidden_layers", 3, {"hidden": 1.0}),
        ("num_attention_heads", 2, {"attention": 1.0}),
        ("hidden_size", 64, {"embedding": 1.0}),
    ]:
        teacher = tiny_llama(**{name: value})
        with pytest.raises(ModelError, match=f"student's {name} is .*, the teacher's {value}"):
            distill(student, teacher, DATA, weights=weights, **FAST)
