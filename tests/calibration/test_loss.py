from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tnlm.calibration import loss
from tnlm.calibration.data import token_batches
from tnlm.calibration.inputs import IGNORED
from tnlm.calibration.loss import make_tasks, sample

MASKED = {
    "input_ids": torch.tensor([[9, 3, 4, 5, 0], [6, 7, 8, 9, 10]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]),
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", [[-100, 4, 5, -100, -100], [7, -100, -100, 10, -100]]),
        ("masked-bert", [[-100, 3, 4, 5, -100], [6, 7, -100, 9, 10]]),
    ],
)
def test_padding_is_neither_predicted_nor_predicted_from(kind, expected, make_model):
    [task] = make_tasks(make_model(kind), [MASKED], "data")
    assert task.labels.tolist() == expected
    assert task.draws is None
    [task] = make_tasks(make_model(kind), [MASKED])
    assert len(task.draws) == (task.labels != IGNORED).sum()


def test_the_loss_is_a_sum_and_leaves_the_labels(make_model):
    model, logits = make_model("llama"), torch.linspace(-3, 3, 2 * 5 * 64).reshape(2, 5, 64).sin()
    [task] = make_tasks(model, [MASKED], "data")
    expected = sum(
        F.cross_entropy(logits[row, at], torch.tensor(word))
        for row, at, word in [(0, 1, 4), (0, 2, 5), (1, 0, 7), (1, 3, 10)]
    )
    torch.testing.assert_close(task.loss(model, SimpleNamespace(logits=logits)), expected)
    half = task.loss(model, SimpleNamespace(logits=logits.to(torch.bfloat16)))
    assert half.dtype == torch.float32
    [task] = make_tasks(model, [MASKED])
    before = task.labels.clone()
    first, again = (task.loss(model, SimpleNamespace(logits=logits)) for _ in range(2))
    assert first == again
    assert torch.equal(task.labels, before)


def test_draws_are_the_same_for_batches_of_any_size(make_model):
    def draws(size, seed):
        rows = [[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13, 14]]
        tasks = make_tasks(make_model("llama"), token_batches(rows, batch_size=size), seed=seed)
        return torch.cat([task.draws for task in tasks])

    for size in (2, 3, 4):
        assert torch.equal(draws(size, 7), draws(1, 7))
    assert not torch.equal(draws(1, 7), draws(1, 8))


def test_samples_follow_the_model(gaussian):
    count, logits = 20_000, gaussian(5, seed=1)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = torch.ones(count, dtype=torch.bool)
    words = sample(logits.expand(count, 5), chosen, draws)
    shares = words.bincount(minlength=5) / count
    # Three standard deviations of a share are at most 3 / sqrt(4 count).
    torch.testing.assert_close(shares.double(), logits.softmax(0), rtol=0, atol=1.5 / count**0.5)


def test_the_true_fisher_information_has_no_mean_gradient(make_model, gaussian):
    """Scores have mean 0 and the loss's own curvature as second moment, diag(p) - p p.T."""
    model, count = make_model("llama"), 4096
    row = 2 * gaussian(64)
    logits = row.float().expand(1, count, 64).clone().requires_grad_()
    ids = torch.full((1, count), 3)
    [task] = make_tasks(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    [scores] = torch.autograd.grad(task.loss(model, SimpleNamespace(logits=logits)), logits)
    scores = scores[0, :-1].double()
    assert not logits.grad
    p = row.softmax(0)
    bound = 4 * (p * (1 - p) / count).sqrt()
    assert bool((scores.mean(0).abs() <= bound).all())
    curvature = p.diag() - p.outer(p)
    error = scores.T @ scores / len(scores) - curvature
    assert float(error.norm() / curvature.norm()) < 0.1
    # Labels of the data are always the same word here: their mean gradient is far from 0.
    [task] = make_tasks(model, [task.batch], "data")
    [scores] = torch.autograd.grad(task.loss(model, SimpleNamespace(logits=logits)), logits)
    assert not bool((scores[0, :-1].mean(0).abs() <= bound).all())


def test_words_of_no_probability_are_never_drawn(monkeypatch):
    monkeypatch.setattr(loss, "POSITIONS", 2)
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 0.0, -inf]]).expand(5, 4)
    draws = torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53], dtype=torch.float64)
    chosen = torch.tensor([True, True, False, True, True])
    assert sample(logits, chosen, draws).tolist() == [1, 1, 2, 2]
