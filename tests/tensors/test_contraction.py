from __future__ import annotations

import itertools
import math

import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import formats
from tnlm.decompositions.base import Ceiling
from tnlm.errors import RankError
from tnlm.layers.linear import FactorizedLinear
from tnlm.tensors.contraction import chain, pairwise
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Gauge, Network

size, seeds = st.integers(1, 4), st.integers(0, 20)


@st.composite
def trains(draw):
    order = draw(st.integers(2, 4))
    out, inp, bonds = "abcd"[:order], "efgh"[:order], ["", *"xyz"[: order - 1], ""]
    factors = {f"core{k}": bonds[k] + out[k] + inp[k] + bonds[k + 1] for k in range(order)}
    return network(draw, factors, out, inp)


@st.composite
def tuckers(draw):
    outs, inps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    modes = "abc"[:outs] + "efg"[:inps]
    reduced = [mode for mode in modes if draw(st.booleans())]
    core = "".join(mode.upper() if mode in reduced else mode for mode in modes)
    factors = {"core": core} | {f"mode_{mode}": mode + mode.upper() for mode in reduced}
    return network(draw, factors, "abc"[:outs], "efg"[:inps])


@st.composite
def kronecker_sums(draw):
    return network(draw, {"left": "tac", "right": "tbd"}, "ab", "cd")


def network(draw, factors, out, inp):
    modes = sorted(set("".join(factors.values())))
    return Network(factors, out, inp, {mode: draw(size) for mode in modes})


@st.composite
def block_trains(draw):
    """Draw trains whose open modes may stand in several cores, as in (abcr, bcrd)."""
    cores = draw(st.integers(1, 3))
    held = [set() for _ in range(cores)]
    for mode in "abcd":
        for core in draw(st.sets(st.integers(0, cores - 1), min_size=1)):
            held[core].add(mode)
    bonds = ["", *"xyz"[: cores - 1], ""]
    modes = ["".join(draw(st.permutations(sorted(core)))) for core in held]
    factors = {f"core{k}": bonds[k] + modes[k] + bonds[k + 1] for k in range(cores)}
    return network(draw, factors, "ab", "cd")


networks = st.one_of(trains(), tuckers(), kronecker_sums(), block_trains())


def operands(network, gaussian, seed=0):
    """Return factors, and the matrix that torch's own einsum makes of them."""
    names = enumerate(network.factors)
    factors = {name: gaussian(*network.shape_of(name), seed=seed + k) for k, name in names}
    dense = torch.einsum(network.equation, *factors.values()).reshape(network.shape)
    return factors, dense


def orders(network):
    """Return every order of the factors, as far as each shares a mode with the activation."""
    for order in itertools.permutations(network.factors):
        current = set(network.inp)
        for position, factor in enumerate(order, start=1):
            modes = set(network.factors[factor])
            if not current & modes:
                break
            later = (network.factors[name] for name in order[position:])
            current = (current | modes) & set(network.out).union(*later)
        else:
            yield order


@given(network=networks, seed=seeds)
def test_chain_and_pairwise_equal_einsum(network, seed, gaussian):
    factors, dense = operands(network, gaussian, seed)
    table = pairwise(network)(list(factors.values()))
    assert table.shape == tuple(network.sizes[mode] for mode in network.out + network.inp)
    torch.testing.assert_close(table.reshape(network.shape), dense, atol=1e-10, rtol=1e-10)
    layer = FactorizedLinear(network, bias=False, dtype=torch.float64).store(factors)
    layer.crossing = math.inf
    x = gaussian(2, 3, network.shape[1], seed=seed + 9)
    torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-9, rtol=1e-10)


@given(network=networks, seed=seeds)
def test_any_order_gives_the_same_and_none_is_cheaper(network, seed, gaussian):
    factors, dense = operands(network, gaussian, seed)
    x = gaussian(3, network.shape[1], seed=seed + 9)
    best = chain(network).macs
    for order in itertools.islice(orders(network), 12):
        plan = chain(network, order)
        assert plan.order == order
        assert plan.macs >= best
        layer = FactorizedLinear(network, bias=False, order=order, dtype=torch.float64)
        layer.store(factors).crossing = math.inf
        assert layer.chain == plan
        torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-9, rtol=1e-10)
    assert best == min(chain(network, order).macs for order in orders(network))


@pytest.mark.parametrize("shape", [(12, 8), (6, 20), (24, 24), (7, 11), (16, 3)])
@pytest.mark.parametrize("keep", [0.5, 0.9, math.inf])
def test_no_chain_that_opt_einsum_finds_is_cheaper(shape, keep):
    seen = 0
    for structure in formats().values():
        if "linear" in structure.kinds:
            options = {"gauge": False}  # opt_einsum knows no gauge
            for spec in structure.candidates(shape, options, Ceiling(keep * math.prod(shape))):
                network = structure.network(shape, spec)
                price, is_chain = best_path(network)
                assert not is_chain or chain(network).macs <= price
                seen += is_chain
    assert seen > 0


def best_path(network: Network) -> tuple[int, bool]:
    """Return what opt_einsum's best path costs one token, and whether it is a chain."""
    terms = [*network.factors.values(), network.inp]
    shapes = [tuple(network.sizes[mode] for mode in term) for term in terms]
    equation = ",".join(terms) + "->" + network.out
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    price, is_chain = 0, True
    for pair in path:
        # The activation is the last operand: the token at first, then the result of a step.
        is_chain &= len(terms) - 1 in pair
        taken = [terms.pop(position) for position in sorted(pair, reverse=True)]
        modes = "".join(dict.fromkeys("".join(taken)))
        price += network.size(modes)
        left = set("".join(terms)) | set(network.out)
        terms.append("".join(mode for mode in modes if mode in left))
    return price, is_chain


@given(network=networks)
def test_rebuilding_costs_what_its_steps_multiply(network):
    plan = pairwise(network)
    price, terms = 0, list(network.factors.values())
    for positions, equation in plan.steps:
        operands, result = equation.split("->")
        taken = [terms.pop(position) for position in positions]
        assert operands.split(",") == taken
        assert len(taken) <= 2
        price += network.size("".join(set("".join(taken)))) if len(taken) == 2 else 0
        terms.append(result)
    assert terms == [network.out + network.inp]
    assert plan.macs == price


LOW_RANK = Network({"left": "or", "right": "ri"}, "o", "i", {"o": 6, "r": 2, "i": 5})


@pytest.mark.parametrize("order", [(), ("left",), ("left", "left"), ("right", "left", "up")])
def test_an_order_must_name_every_factor_once(order):
    with pytest.raises(RankError, match=r"allowed: a permutation of \['left', 'right'\]"):
        chain(LOW_RANK, order)


@pytest.mark.parametrize("gauge", [None, Gauge("left", "r"), Gauge("right", "r")])
def test_an_order_may_start_at_the_outputs(gauge, gaussian):
    network = Network(LOW_RANK.factors, "o", "i", LOW_RANK.sizes, gauge)
    factors = {"left": gaussian(6, 2), "right": gaussian(2, 5, seed=1)}
    layer = FactorizedLinear(network, bias=False, order=("left", "right"), dtype=torch.float64)
    layer.store(fix(network, factors)).crossing = math.inf
    x = gaussian(3, 5, seed=2)
    expected = x @ (factors["left"] @ factors["right"]).T
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)


def test_the_identity_block_of_a_gauge_costs_nothing():
    gauged = Network(LOW_RANK.factors, "o", "i", LOW_RANK.sizes, Gauge("left", "r"))
    assert chain(LOW_RANK).macs == 2 * 5 + 6 * 2
    assert chain(gauged).macs == gauged.params == 2 * 5 + (6 - 2) * 2


MONARCH = Network(
    {"left": "abcr", "right": "bcrd"}, "ab", "cd", {"a": 4, "b": 3, "c": 2, "d": 5, "r": 2}
)


def test_a_shared_mode_numbers_blocks_until_nothing_later_holds_it():
    right, left = chain(MONARCH).steps
    assert (right.factor, right.batch, right.kept, right.contracted) == ("right", "c", "br", "d")
    assert (left.factor, left.batch, left.kept, left.contracted) == ("left", "b", "a", "cr")
    assert (right.blocks, right.width, left.blocks, left.width) == (2, 5, 3, 4)
    assert chain(MONARCH).macs == MONARCH.params == 2 * 3 * 2 * (4 + 5)
    layer = FactorizedLinear(MONARCH, bias=False)
    # What PEFT and quantizers meet: one linear a factor, the blocks stacked.
    assert (layer.right.in_features, layer.right.out_features) == (5, 2 * 3 * 2)
    assert (layer.left.in_features, layer.left.out_features) == (2 * 2, 3 * 4)


def test_blocks_of_size_one_are_plain_products(gaussian):
    plain = Network(MONARCH.factors, "ab", "cd", {"a": 6, "b": 1, "c": 1, "d": 5, "r": 2})
    factors, dense = operands(plain, gaussian)
    layer = FactorizedLinear(plain, bias=False, dtype=torch.float64).store(factors)
    assert layer.flat
    x = gaussian(3, 5, seed=9)
    torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("sizes", [{}, {"b": 1}, {"c": 1}, {"b": 1, "c": 1}])
@pytest.mark.parametrize("gauged", ["left", "right"])
@pytest.mark.parametrize("order", [("right", "left"), ("left", "right")])
@pytest.mark.parametrize("factors", [MONARCH.factors, {"left": "abr", "right": "brcd"}])
def test_a_gauge_may_lie_between_blocks(sizes, gauged, order, factors, gaussian):
    gauge = Gauge(gauged, "r")
    network = Network(factors, "ab", "cd", {**MONARCH.sizes, **sizes}, gauge)
    factors, dense = operands(network, gaussian)
    layer = FactorizedLinear(network, bias=False, order=order, dtype=torch.float64)
    layer.store(fix(network, factors)).crossing = math.inf
    x = gaussian(3, network.shape[1], seed=9)
    torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("blocks", "saved"), [(1, 2 * 2), (3, 0)])
def test_an_identity_block_is_copied_only_where_all_blocks_hold_it(blocks, saved):
    sizes = {"a": 4, "b": blocks, "d": 5, "r": 2}
    shared = Network({"left": "abr", "right": "brd"}, "ab", "d", sizes, Gauge("left", "r"))
    assert chain(shared).macs == blocks * 2 * (4 + 5) - saved


def test_rows_share_a_mode_between_factors(gaussian):
    sizes = {"z": 4, "a": 2, "b": 3, "p": 2}
    table = Network({"core0": "zap", "core1": "zpb"}, "z", "ab", sizes)
    factors, dense = operands(table, gaussian)
    rows = pairwise(table)([factor[1:3] for factor in factors.values()])
    torch.testing.assert_close(rows.flatten(1), dense[1:3])
