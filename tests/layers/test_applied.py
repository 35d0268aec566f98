"""A child is applied by its weight alone, unless something would notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as every

import tnlm
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


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_global_hooks_are_called(register):
    child, calls = nn.Linear(4, 3, bias=False), []
    note = {child: calls.append}
    handle = getattr(every, f"register_module_{register}")(
        lambda module, *_: note[module](1) if module in note else None
    )
    try:
        applied = apply_linear(child, X.clone().requires_grad_(), BIAS)
        applied.sum().backward()
    finally:
        handle.remove()
    assert calls == [1]
    assert torch.equal(applied, child(X) + BIAS)


@pytest.mark.parametrize("gauge", [True, False])
def test_replicas_apply_weights_that_are_no_parameters(gauge, tiny_llama):
    model = tnlm.compress(tiny_llama(), tnlm.scheme("svd", gauge=gauge), progress=False)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    assert torch.equal(_replica(layer)(x), expected)


def _replica(module):
    """Return a replica as `torch.nn.parallel.replicate` makes it, without its copy to a device."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(made, name, _replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.detach().clone())
    return made


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype_is_converted(kind):
    child = nn.Linear(4, 3, bias=False, dtype=kind)
    nn.init.constant_(child.weight, 0.25)
    x, bias = torch.arange(8.0, dtype=kind).reshape(2, 4), torch.tensor([0.5, -1.0, 2.0])
    applied = apply_linear(child, x, bias)  # of few bits, so that no order of sums rounds
    assert applied.dtype is kind
    assert torch.equal(applied, child(x) + bias.to(kind))
