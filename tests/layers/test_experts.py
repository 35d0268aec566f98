"""Stacks of experts do what the layers of single experts do, in every format."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.mixtures import KINDS, make
from tnlm.decompositions import formats, get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.stack_tucker import FORMAT as STACK_TUCKER
from tnlm.decompositions.stack_tucker import SLICE, StackTuckerSpec
from tnlm.layers.expert_layout import layout_of
from tnlm.layers.experts import FactorizedExperts, StackedFactors, StackedLinear
from tnlm.layers.grouped import Groups
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.unfolded import bare
from tnlm.metrics.metric import Metric
from tnlm.targets.tensor_stacks import _slice
from tnlm.tensors.gauge import fix

SHAPES = [(24, 16), (16, 24), (16, 16)]
IDS = torch.tensor([0, 0, 0, 2, 2, 3, 4])  # none for expert 1; the last is of no expert
FORMATS = sorted(
    name for name, each in formats().items() if "linear" in each.kinds and name != "stack-tucker"
)


def layers_of(name, shape, bias=True):
    """Return four layers of one network, fitted to random matrices."""
    structure, made = get_format(name), []
    spec = structure.candidates(shape, {}, Ceiling(0.6 * shape[0] * shape[1]))[0]
    network = structure.network(shape, spec)
    for seed in range(4):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
        layer = FactorizedLinear(network, bias=bias, dtype=torch.float64)
        factors = fix(network, structure.fit(weight, Metric(), spec))
        made.append(layer.store(factors, torch.randn(shape[0]).double()))
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_stack_does_what_its_layers_do(name, shape, needs_grad):
    layers = layers_of(name, shape)
    first = layers[0]
    stack = StackedFactors(
        4, first.network, bias=True, order=first.chain.order, dtype=torch.float64
    ).store(layers)
    x = torch.randn(len(IDS), shape[1]).double()
    with torch.set_grad_enabled(needs_grad):
        found = stack(x, Groups.of(IDS, 4))
        for row, expert in enumerate(IDS.tolist()[:-1]):
            torch.testing.assert_close(found[row], layers[expert](x[row]))
    for number, layer in enumerate(layers):
        again = stack.layer(number)
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), layer.state_dict().values(), strict=True)
        )


def test_dense_matrices_are_stacked():
    layers = [nn.Linear(3, 5) for _ in range(4)]
    stack = StackedLinear(4, (5, 3), bias=True).store(layers)
    x = torch.randn(len(IDS), 3)
    found = stack(x, Groups.of(IDS, 4))
    for row, expert in enumerate(IDS.tolist()[:-1]):
        torch.testing.assert_close(found[row], layers[expert](x[row]))
    assert torch.equal(stack.layer(2).weight, layers[2].weight)


def dense_experts(kind):
    module = next(m for m in make(kind).modules() if layout_of(m))
    layout = layout_of(module)
    stacks = {}
    for name, shape in layout.shapes.items():
        stacks[name] = StackedLinear(4, shape, bias=layout.biased)
        stacks[name].weight.data.copy_(layout.weight(module, name))
        if layout.biased:
            stacks[name].bias.data.copy_(layout.bias(module, name))
    return module, FactorizedExperts(layout, bare(module, layout), stacks)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_of_dense_matrices_are_the_module(kind):
    module, stacked = dense_experts(kind)
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [3, 0], [0, 3], [1, 3], [3, 1], [1, 0]])
    torch.testing.assert_close(stacked(x, index, weights), module(x, index, weights))
    torch.testing.assert_close(
        copy.deepcopy(stacked)(x, index, weights), stacked(x, index, weights)
    )


def test_half_precision_and_devices_reach_every_stack():
    _, stacked = dense_experts("GptOss")
    assert {p.dtype for p in stacked.bfloat16().parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in stacked.to("meta").parameters())


@pytest.mark.parametrize("ranks", [(4, 12, 9), (4, 24, 8), (4, 10, 16), (2, 12, 9), (2, 24, 16)])
@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_experts_share_is_held_once(ranks, gauge, needs_grad):
    spec = StackTuckerSpec(ranks, 4, 4, gauge)
    tall = torch.randn(4 * 24, 16, generator=torch.Generator().manual_seed(0)).double()
    network = STACK_TUCKER.network(tall.shape, spec)
    factors = fix(network, STACK_TUCKER.fit(tall, Metric(), spec))
    one = STACK_TUCKER.network((24, 16), StackTuckerSpec(ranks, 1, 4, gauge))
    layers = [
        FactorizedLinear(one, bias=False, dtype=torch.float64).store(_slice(network, factors, e))
        for e in range(4)
    ]
    shared = [name for name, modes in network.factors.items() if SLICE not in modes]
    stack = StackedFactors(
        4, one, bias=False, order=layers[0].chain.order, shared=shared, dtype=torch.float64
    ).store(layers)
    assert sum(p.numel() for p in stack.parameters()) == network.params
    x = torch.randn(len(IDS), 16).double()
    with torch.set_grad_enabled(needs_grad):
        found = stack(x, Groups.of(IDS, 4))
        for row, expert in enumerate(IDS.tolist()[:-1]):
            torch.testing.assert_close(found[row], layers[expert](x[row]))
    for number, layer in enumerate(layers):
        again = stack.layer(number).state_dict()
        assert all(torch.equal(again[name], each) for name, each in layer.state_dict().items())
