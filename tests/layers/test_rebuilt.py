"""Rebuilt weights: taken where they are priced faster, kept within a bound, never stale."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnlm
from tnlm.decompositions import get_format
from tnlm.errors import OptionError
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.machine import Machine
from tnlm.layers.pricing import crossing, rebuilding, through
from tnlm.layers.rebuilt import RebuiltWeights, keep_rebuilt
from tnlm.tensors.contraction import chain
from tnlm.tensors.network import Network

TRAIN = Network(
    {"a": "oab", "b": "pbcx", "c": "qcy"},
    "opq",
    "axy",
    {"o": 4, "p": 4, "q": 4, "a": 4, "x": 4, "y": 4, "b": 5, "c": 5},
)
BYTES = 64 * 64 * 8
FAST = Machine(1e-6, 1e-6, (1e-10,) * 5, 1e-10, (1e-9, 1e-10, 2e-11, 1e-11), True)


def layer(seed: int = 0) -> FactorizedLinear:
    generator = torch.Generator().manual_seed(seed)
    made = FactorizedLinear(TRAIN, bias=False, dtype=torch.float64)
    factors = {
        name: torch.randn(TRAIN.shape_of(name), generator=generator, dtype=torch.float64)
        for name in TRAIN.factors
    }
    made.store(factors).crossing = 0
    return made


@torch.no_grad()
def test_a_kept_weight_is_used_again_until_a_factor_changes(monkeypatch):
    made, x = layer(), torch.randn(7, 64, dtype=torch.float64)
    expected, rebuilds = made(x), []
    original = FactorizedLinear.to_dense
    monkeypatch.setattr(
        FactorizedLinear, "to_dense", lambda self: rebuilds.append(1) or original(self)
    )
    kept = keep_rebuilt(made, 2**20)
    made.crossing = 0
    for _ in range(3):
        torch.testing.assert_close(made(x), expected)
    assert len(rebuilds) == 1
    assert kept.bytes == BYTES
    made.b.weight.mul_(2.0)
    torch.testing.assert_close(made(x), 2 * expected)
    made.c.weight.data = 3 * made.c.weight.data
    torch.testing.assert_close(made(x), 6 * expected)
    assert len(rebuilds) == 3
    assert kept.bytes == BYTES


@torch.no_grad()
@given(st.integers(0, 4 * BYTES), st.lists(st.integers(0, 3), max_size=12))
def test_no_more_is_kept_than_allowed(most, calls):
    layers, kept = [layer(seed) for seed in range(4)], RebuiltWeights(most)
    for index in calls:
        torch.testing.assert_close(kept.weight(layers[index]), layers[index].to_dense())
        assert kept.bytes <= most
    assert kept.bytes == BYTES * min(len(set(calls)), most // BYTES)


def test_training_copies_and_pickles_do_not_use_what_is_kept():
    made = layer()
    kept = keep_rebuilt(made, 2**20)
    made.crossing = 0
    made(torch.randn(2, 64, dtype=torch.float64)).sum().backward()
    assert kept.bytes == 0
    assert made.b.weight.grad is not None
    with torch.no_grad():
        made(torch.randn(2, 64, dtype=torch.float64))
    assert kept.bytes == BYTES
    for other in (copy.deepcopy(made).rebuilt, pickle.loads(pickle.dumps(kept))):
        assert (other.bytes, other.max_bytes) == (0, 2**20)


def test_a_model_shares_one_bound_and_gives_it_up(tiny_llama):
    model = tnlm.compress(tiny_llama(), "tt", keep_targets=0.6, progress=False)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
        kept = tnlm.keep_rebuilt(model, 2**20)
        for module in model.modules():
            if isinstance(module, FactorizedLinear):
                module.crossing = 0
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert 0 < kept.bytes <= 2**20
    assert tnlm.keep_rebuilt(model, 0).bytes == 0
    assert all(getattr(module, "rebuilt", None) is None for module in model.modules())


def test_a_negative_bound_is_refused():
    with pytest.raises(OptionError, match="max_bytes=-1; allowed: 0 or more"):
        RebuiltWeights(-1)


@given(st.sampled_from(["kronecker", "tensor-train", "tucker", "block-train", "low-rank"]))
def test_a_crossing_is_where_the_rebuilt_weight_gets_cheaper(name):
    structure, shape = get_format(name), (96, 64)
    for spec in structure.candidates(shape, {}, tnlm.decompositions.base.Ceiling(3000))[:3]:
        network = structure.network(shape, spec)
        plan = chain(network)
        tokens = crossing(network, plan, FAST, 4)
        kept = crossing(network, plan, FAST, 4, kept=True)
        assert kept <= tokens
        if tokens < math.inf:
            rebuilt = rebuilding(network, FAST, 4) + FAST.product(int(tokens), *shape, 1, 4)
            assert rebuilt < through(network, plan, FAST, 4, int(tokens))


def test_two_plain_products_are_never_rebuilt():
    low_rank = Network({"l": "oa", "r": "ai"}, "o", "i", {"o": 12, "a": 3, "i": 8})
    made = FactorizedLinear(low_rank, bias=False)
    assert made.crossing == math.inf
    keep_rebuilt(made, 2**20)
    assert made.to(torch.float64).crossing == math.inf


def test_training_does_not_save_what_lies_between_the_factors():
    network = Network(
        {"a": "toi", "b": "tpj"}, "op", "ij", {"t": 8, "o": 8, "p": 8, "i": 8, "j": 8}
    )
    made = FactorizedLinear(network, bias=False, dtype=torch.float64)
    made.store({n: torch.randn(network.shape_of(n), dtype=torch.float64) for n in "ab"})
    made.crossing = math.inf
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made(x)
    parameters = {p.data_ptr() for p in made.parameters()}
    numbers = sum(t.numel() for t in saved if t.data_ptr() not in parameters)
    assert numbers <= x.numel()
    out.square().sum().backward()
    found = [x.grad, *(p.grad for p in made.parameters())]
    y = x.detach().clone().requires_grad_()
    dense = made.to_dense()
    expected = torch.autograd.grad((y @ dense.T).square().sum(), [y, *made.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
