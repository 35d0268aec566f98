"""Layers take whatever a dense layer takes, and refuse what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

STRIDED = {
    "transposed batch": lambda x: x.transpose(0, 1),
    "every other token": lambda x: x[:, ::2],
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "reversed and shifted": lambda x: torch.cat((x, x), -1)[..., 7 : 7 + x.shape[-1]],
    "one token for all": lambda x: x[:1, :1].expand(4, 6, -1),
    "one number for all": lambda x: x[:1, :1, :1].expand(2, 3, x.shape[-1]),
    "overlapping windows": lambda x: x.flatten().unfold(0, x.shape[-1], 3),
}


@pytest.mark.parametrize("stride", STRIDED.values(), ids=STRIDED)
def test_inputs_may_lie_in_memory_as_they_like(stride, either, gaussian):
    x = stride(gaussian(4, 6, 16))
    assert not x.is_contiguous()
    torch.testing.assert_close(either.layer(x), either.dense(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (0, 5), (5, 0), (0, 0), (1, 1), (2, 1, 3)])
def test_inputs_may_have_any_leading_axes_and_no_tokens(lead, either, gaussian):
    x = gaussian(*lead, 16).requires_grad_()
    out = either.layer(x)
    assert out.shape == (*lead, either.dense.out_features)
    torch.testing.assert_close(out, either.dense(x), atol=1e-9, rtol=1e-9)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None for p in either.layer.parameters())


@pytest.mark.parametrize("lead", [(), (0,), (1,), (0, 5), (5, 0), (2, 1, 3)])
def test_lookups_may_have_any_leading_axes_and_no_tokens(lead, table):
    ids = torch.arange(math.prod(lead)).reshape(lead)
    torch.testing.assert_close(table.layer(ids), table.dense(ids), atol=1e-9, rtol=1e-9)


def test_lookups_refuse_what_an_embedding_refuses(table):
    for wrong in (torch.tensor([24]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises((IndexError, RuntimeError)) as refused:
            table.dense(wrong)
        with pytest.raises(refused.type):
            table.layer(wrong)


@pytest.mark.parametrize("wrong", [(3, 15), (3, 17), (16, 3), (15,), (2, 8), (3, 0)], ids=str)
def test_inputs_of_another_width_are_refused_as_by_a_dense_layer(wrong, either, gaussian):
    with pytest.raises(RuntimeError):
        either.dense(gaussian(*wrong))
    with pytest.raises(RuntimeError):
        either.layer(gaussian(*wrong))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.float64, torch.float16, torch.int64])
def test_inputs_of_another_dtype_are_refused_as_by_a_dense_layer(weights, given, either):
    x = torch.ones(3, 16, dtype=given)
    for module in either.to(weights):
        with pytest.raises(RuntimeError):
            module(x)


def test_autocast_computes_in_bfloat16_and_near_the_truth(pair, gaussian):
    x = gaussian(5, 16).float()
    layer, dense = pair.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == dense(x).dtype == torch.bfloat16
        out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    found, expected = out.detach().float(), dense(x).detach()
    # Rounding of 2**-9 a number, in a few products, against the size of the result.
    assert float((found - expected).norm()) <= 0.03 * float(expected.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, either, gaussian):
    x, found = gaussian(4, 6, 16).requires_grad_(), []
    for apply in (either.layer, lambda x: checkpoint(either.layer, x, use_reentrant=reentrant)):
        either.layer.zero_grad()
        x.grad = None
        apply(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in either.layer.parameters())])
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


def test_gradients_of_inputs_are_those_of_the_dense_layer(either, gaussian):
    x = gaussian(4, 6, 16).requires_grad_()
    found = [
        torch.autograd.grad(layer(x).square().sum(), x) for layer in (either.layer, either.dense)
    ]
    torch.testing.assert_close(*found, atol=1e-7, rtol=1e-9)


def test_inference_mode_gives_the_same_and_may_be_left_again(either, gaussian):
    x = gaussian(4, 6, 16)
    with torch.inference_mode():
        inside = either.layer(x)
    assert inside.is_inference()
    torch.testing.assert_close(inside.clone(), either.layer(x), atol=1e-12, rtol=0)
    either.layer(x).sum().backward()


def test_more_threads_than_cores_give_the_same(either, gaussian):
    x, before = gaussian(64, 32, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        out = either.layer(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, either.dense(x), atol=1e-9, rtol=1e-9)
