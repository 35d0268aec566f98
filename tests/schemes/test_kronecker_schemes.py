"""Shapeshifter and KnGPT2: what sums of Kronecker products are, against torch's own product."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.checkpoint.entries import build
from tnlm.decompositions import get_format
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.schemes import get_scheme
from tnlm.targets.matrix import MatrixTarget
from tnlm.tensors.network import Cost
from tnlm.tensors.rearrange import rearrange

ranks, seeds = st.integers(1, 6), st.integers(0, 15)
SPLITS = st.sampled_from([((4, 3), (3, 2)), ((2, 6), (6, 1)), ((3, 4), (1, 6)), ((12, 1), (2, 3))])


def same(one, other):
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def kronecker(weight, spec):
    """Return the factors of the format that shapeshifter and kngpt2 share."""
    formats = {get_scheme(name).formats[0] for name in ("shapeshifter", "kngpt2", "kron")}
    assert formats == {"kronecker"}
    return get_format("kronecker").fit(weight, Metric(), spec)


def summed(factors):
    return sum(torch.kron(a, b) for a, b in zip(factors["left"], factors["right"], strict=True))


@given(splits=SPLITS, part=st.floats(0, 1), seed=seeds)
def test_a_sum_of_kronecker_products_errs_by_the_tail(splits, part, seed, gaussian):
    weight, (out, inp) = gaussian(12, 6, seed=seed), splits
    full = min(out[0] * inp[0], out[1] * inp[1])
    terms = max(1, round(part * full))
    rebuilt = summed(kronecker(weight, KroneckerSpec(terms, out, inp)))
    singular = torch.linalg.svdvals(rearrange(weight, out, inp))
    tail = float(singular[terms:].square().sum()) ** 0.5
    assert float((weight - rebuilt).norm()) == pytest.approx(tail, abs=1e-9)
    same(summed(kronecker(weight, KroneckerSpec(full, out, inp))), weight)
    one = summed(kronecker(weight, KroneckerSpec(1, out, inp)))  # KnGPT2
    tail = float(singular[1:].square().sum()) ** 0.5
    assert float((weight - one).norm()) == pytest.approx(tail, abs=1e-9)


@given(splits=SPLITS, terms=st.integers(1, 2), gauge=st.booleans(), seed=seeds)
def test_a_layer_applies_the_sum_without_forming_it(splits, terms, gauge, seed, gaussian):
    weight, x = gaussian(12, 6, seed=seed), gaussian(5, 6, seed=seed + 1)
    (a, b), (c, d) = splits
    spec = {"terms": min(terms, a * c, b * d), "out_split": (a, b), "in_split": (c, d)}
    target = MatrixTarget("layer", "layer", (12, 6))
    cost, options = Cost(0, 0, 0), spec | {"gauge": gauge}
    plan = LayerPlan("layer", "linear", (12, 6), "kronecker", options, cost, cost)
    ((_, entry, layer),) = target.fit_to(weight, None, plan, Metric()).pieces
    layer.crossing = float("inf")  # through the factors
    rebuilt = summed(kronecker(weight, KroneckerSpec(**options)))
    same(layer(x).detach(), x @ rebuilt.T)
    other = build(copy.deepcopy(entry), dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    same(other(x).detach(), layer(x).detach())


@given(rank=ranks, seed=seeds)
def test_kronecker_splits_reach_from_one_exact_term_to_low_rank(rank, seed, gaussian):
    weight = gaussian(12, 6, seed=seed)
    same(summed(kronecker(weight, KroneckerSpec(1, (12, 1), (6, 1)))), weight)
    same(summed(kronecker(weight, KroneckerSpec(1, (1, 12), (1, 6)))), weight)
    low_rank = summed(kronecker(weight, KroneckerSpec(rank, (12, 1), (1, 6))))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    same(low_rank, (u[:, :rank] * s[:rank]) @ vh[:rank])
