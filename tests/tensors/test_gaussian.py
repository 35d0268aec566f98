"""Random factors: the variance of their product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.tensors.gauge import expand, fix
from tnlm.tensors.gaussian import gaussian
from tnlm.tensors.network import Network

LINEAR = ("low-rank", "kronecker", "tucker", "tensor-train", "block-train")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.floats(1e-3, 10), st.integers(0)
)
def test_variances_of_factors_times_paths_are_that_of_the_product(rows, rank, columns, std, seed):
    sizes = {"o": rows, "r": rank, "i": columns}
    network = Network({"left": "or", "right": "ri"}, "o", "i", sizes)
    drawn = gaussian(network, std, seeded(seed % 2**32))
    found = rank * math.prod(float(factor.square().mean()) for factor in drawn.values())
    assert found == pytest.approx(std**2)


@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("name", LINEAR)
def test_the_product_has_the_standard_deviation_asked_for(name, share):
    shape = (192, 160)
    structure = get_format(name)
    for spec in structure.candidates(shape, {"gauge": False}, Ceiling(share * math.prod(shape))):
        factors = gaussian(structure.network(shape, spec), 0.02, seeded())
        rebuilt = structure.reconstruct(shape, spec, factors)
        assert float(rebuilt.std()) == pytest.approx(0.02, rel=0.05), spec
        assert abs(float(rebuilt.mean())) < 0.004, spec


def test_over_many_draws_the_variance_is_exact():
    structure, spec = get_format("kronecker"), KroneckerSpec(2, (3, 2), (2, 4), gauge=False)
    network = structure.network((6, 8), spec)
    generator = seeded()
    drawn = [
        structure.reconstruct((6, 8), spec, gaussian(network, 0.5, generator)) for _ in range(4000)
    ]
    entries = torch.stack(drawn)
    torch.testing.assert_close(
        entries.var(0).mean().sqrt(), torch.tensor(0.5).double(), rtol=0.02, atol=0
    )
    assert float(entries.mean(0).abs().max()) < 0.05


def test_a_factor_of_two_numbers_is_no_lottery():
    structure, spec = get_format("kronecker"), KroneckerSpec(1, (64, 2), (96, 1), gauge=False)
    network = structure.network((128, 96), spec)
    for seed in range(20):
        rebuilt = structure.reconstruct((128, 96), spec, gaussian(network, 0.02, seeded(seed)))
        assert float(rebuilt.square().mean().sqrt()) == pytest.approx(0.02)


def test_an_identity_block_leaves_the_product_as_it_is():
    structure, spec = get_format("kronecker"), KroneckerSpec(3, (8, 4), (4, 8))
    network = structure.network((32, 32), spec)
    factors = gaussian(network, 0.02, seeded())
    stored = expand(network, fix(network, factors))
    torch.testing.assert_close(
        structure.reconstruct((32, 32), spec, stored),
        structure.reconstruct((32, 32), spec, factors),
    )


def test_the_same_seed_draws_the_same():
    network = Network({"left": "or", "right": "ri"}, "o", "i", {"o": 5, "r": 2, "i": 4})
    first, again, other = (gaussian(network, 1.0, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["left"], again["left"])
    assert not torch.equal(first["left"], other["left"])
