from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.tensors.contraction import pairwise
from tnlm.tensors.gauge import ORDER, expand, fix
from tnlm.tensors.network import Factors, Gauge, Network

sizes, seeds = st.integers(1, 10), st.integers(0, 20)
parts = st.floats(0, 1)


def low_rank(m: int, n: int, r: int, side: str = "left") -> Network:
    gauge = Gauge(side, "r")
    return Network({"left": "or", "right": "ri"}, "o", "i", {"o": m, "r": r, "i": n}, gauge)


def kronecker(a: int, b: int, c: int, d: int, t: int, side: str) -> Network:
    sizes = {"t": t, "a": a, "b": b, "c": c, "d": d}
    return Network({"left": "tac", "right": "tbd"}, "ab", "cd", sizes, Gauge(side, "t"))


def dense(network: Network, factors: Factors) -> torch.Tensor:
    return pairwise(network)([factors[name] for name in network.factors])


def check(network: Network, factors: Factors) -> Factors:
    """Check all that gauge fixing promises; return what is stored."""
    stored = fix(network, factors)
    name, bond = network.gauge.factor, network.gauge.bond
    scale = float(dense(network, factors).abs().max())
    torch.testing.assert_close(
        dense(network, expand(network, stored)),
        dense(network, factors),
        atol=1e-10 * max(scale, 1.0),
        rtol=0,
    )
    order = stored[name + ORDER]
    assert sorted(order.tolist()) == list(range(network.gauge_rows))
    numbers = {key: value.numel() for key, value in stored.items() if key != name + ORDER}
    full = sum(factor.numel() for factor in factors.values())
    assert sum(numbers.values()) == network.params == full - network.sizes[bond] ** 2
    assert float(stored[name].abs().max() if stored[name].numel() else 0) <= 2.0 + 1e-9
    assert order.numel() * order.element_size() == network.index_bytes
    return stored


@given(m=sizes, n=sizes, part=parts, side=st.sampled_from(["left", "right"]), seed=seeds)
def test_low_rank_round_trips_and_saves_a_square(m, n, part, side, seed, gaussian):
    r = max(1, round(part * min(m, n)))
    factors = {"left": gaussian(m, r, seed=seed), "right": gaussian(r, n, seed=seed + 1)}
    check(low_rank(m, n, r, side), factors)


@given(
    a=st.integers(1, 4),
    b=st.integers(1, 4),
    c=st.integers(1, 4),
    d=st.integers(1, 4),
    part=parts,
    side=st.sampled_from(["left", "right"]),
    seed=seeds,
)
def test_kronecker_sums_round_trip_and_save_a_square(a, b, c, d, part, side, seed, gaussian):
    t = max(1, round(part * min(a * c, b * d)))
    factors = {"left": gaussian(t, a, c, seed=seed), "right": gaussian(t, b, d, seed=seed + 1)}
    check(kronecker(a, b, c, d, t, side), factors)


@given(m=sizes, n=sizes, part=parts, rank=st.integers(0, 2), seed=seeds)
def test_a_rank_deficient_factor_does_no_harm(m, n, part, rank, seed, gaussian):
    r = max(1, round(part * min(m, n)))
    left = gaussian(m, rank, seed=seed) @ gaussian(rank, r, seed=seed + 1)
    check(low_rank(m, n, r), {"left": left, "right": gaussian(r, n, seed=seed + 2)})


@pytest.mark.parametrize("exponent", [-12, -6, 6])
def test_factors_of_unequal_scale_keep_their_product(exponent, gaussian):
    scales = torch.logspace(0, exponent, 4, dtype=torch.float64)
    right = gaussian(4, 7, seed=1) / scales.sqrt()[:, None]
    factors = {"left": gaussian(9, 4) * scales, "right": right}
    check(low_rank(9, 7, 4), factors)


@pytest.mark.parametrize("shape", [(5, 5), (5, 8), (8, 5)])
def test_full_rank_costs_what_the_matrix_does(shape, gaussian):
    m, n = shape
    factors = {"left": gaussian(m, 5), "right": gaussian(5, n, seed=1)}
    stored = check(low_rank(m, n, 5), factors)
    assert stored["left"].numel() + stored["right"].numel() == m * n


def test_the_partner_holds_rows_of_the_product(gaussian):
    factors = {"left": gaussian(9, 3), "right": gaussian(3, 6, seed=1)}
    network = low_rank(9, 6, 3)
    stored, product = fix(network, factors), factors["left"] @ factors["right"]
    chosen = [stored["left" + ORDER].tolist().index(k) for k in range(3)]
    torch.testing.assert_close(stored["right"], product[chosen], atol=1e-12, rtol=0)


def test_without_a_gauge_nothing_changes(gaussian):
    network = Network({"left": "or", "right": "ri"}, "o", "i", {"o": 4, "r": 2, "i": 3})
    factors = {"left": gaussian(4, 2), "right": gaussian(2, 3)}
    assert fix(network, factors) is factors
    assert expand(network, factors) is factors
    assert (network.index_bytes, network.gauge_rows) == (0, 0)


def test_any_bond_of_a_longer_network_can_be_gauged(gaussian):
    sizes = {"a": 3, "b": 2, "c": 4, "i": 5, "p": 2, "q": 3}
    for gauge in (Gauge("one", "p"), Gauge("two", "p"), Gauge("two", "q"), Gauge("three", "q")):
        network = Network({"one": "pa", "two": "bpqi", "three": "cq"}, "abc", "i", sizes, gauge)
        names = enumerate(network.factors)
        check(network, {n: gaussian(*network.shape_of(n), seed=seed) for seed, n in names})
