"""A child is applied by its weight alone, unless something would notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.layers.applied import apply_linear
from tnlm.layers.arranged import ArrangedLinear

X, BIAS = torch.randn(2, 4), torch.randn(3)


@pytest.mark.parametrize("kind", [nn.Linear, ArrangedLinear])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_plain_layer_is_applied_exactly(kind, bias):
    child = kind(4, 3, bias=False)
    assert torch.equal(apply_linear(child, X, bias), nn.functional.linear(X, child.weight, bias))


def watched(how):
    child, calls = nn.Linear(4, 3, bias=False), []
    if how == "hook":
        child.register_forward_hook(lambda *_: calls.append(1))
    elif how == "hook before":
        child.register_forward_pre_hook(lambda *_: calls.append(1))
    elif how == "hook backwards":
        child.register_full_backward_hook(lambda *_: calls.append(1))
    else:
        plain = child.forward
        child.forward = lambda x: calls.append(1) or plain(x)
    return child, calls


@pytest.mark.parametrize("how", ["hook", "hook before", "hook backwards", "another forward"])
def test_hooks_and_other_forwards_are_called(how):
    child, calls = watched(how)
    x = X.clone().requires_grad_()
    applied = apply_linear(child, x, BIAS)
    assert torch.equal(applied, child(x) + BIAS)
    applied.sum().backward()
    assert len(calls) == 1 if how == "hook backwards" else len(calls) == 2


def test_layers_of_other_classes_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    child = Doubled(4, 3, bias=False)
    assert torch.equal(apply_linear(child, X), 2 * nn.functional.linear(X, child.weight))
    own = nn.Linear(4, 3)
    assert torch.equal(apply_linear(own, X, BIAS), own(X) + BIAS)
