"""Specs chosen by shape alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.unseen import NEAR, roomiest
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.channel_ranks import ChannelRanksSpec
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.errors import OptionError
from tnlm.tensors.costs import macs, max_rank
from tnlm.tensors.gaussian import gaussian

FORMATS = ("low-rank", "kronecker", "tucker", "tensor-train", "block-train", "kronecker-rows")


@pytest.mark.parametrize("name", FORMATS)
@given(st.sampled_from([(12, 8), (8, 18), (16, 16)]), st.floats(0.2, 0.95), st.integers(0, 99))
def test_the_smallest_cut_is_the_rank_of_random_factors(name, shape, share, seed):
    structure = get_format(name)
    specs = structure.candidates(shape, {"gauge": False}, Ceiling(share * math.prod(shape)))
    for spec in specs[:8]:
        network = structure.network(shape, spec)
        factors = gaussian(network, 1.0, torch.Generator().manual_seed(seed))
        rebuilt = structure.reconstruct(shape, spec, factors)
        assert max_rank(network) == torch.linalg.matrix_rank(rebuilt)


@pytest.mark.parametrize("name", FORMATS)
def test_the_choice_is_large_and_of_the_highest_rank_among_the_large(name):
    shape, structure = (48, 64), get_format(name)
    specs = structure.candidates(shape, {"gauge": False}, Ceiling(0.3 * math.prod(shape)))
    networks = [structure.network(shape, spec) for spec in specs]
    best = structure.network(shape, roomiest(shape, structure, specs))
    large = [n for n in networks if n.params >= NEAR * max(n.params for n in networks)]
    assert best.params in {n.params for n in large}
    assert max_rank(best) == max(map(max_rank, large))
    rivals = [macs(n) for n in large if max_rank(n) == max_rank(best)]
    assert macs(best) == min(rivals)


def test_a_sum_of_kronecker_products_is_no_low_rank_in_disguise():
    shape, structure = (64, 64), get_format("kronecker")
    specs = structure.candidates(shape, {"gauge": False}, Ceiling(0.25 * 64**2, 64**2))
    assert any((s.out_split, s.in_split) == ((64, 1), (1, 64)) for s in specs)
    assert max_rank(structure.network(shape, roomiest(shape, structure, specs))) == 64


def test_a_tie_goes_to_the_first():
    specs = [KroneckerSpec(1, (2, 2), (4, 1)), KroneckerSpec(1, (2, 2), (4, 1))]
    assert roomiest((4, 4), get_format("kronecker"), specs) is specs[0]


def test_a_spec_that_the_matrix_cannot_have_is_an_error():
    with pytest.raises(OptionError, match="multiplies to 6"):
        roomiest((4, 4), get_format("kronecker"), [KroneckerSpec(1, (2, 3), (2, 2))])


def test_a_network_counts_with_those_beside_it():
    sizes = (8, 8, 8)
    small, large = (ChannelRanksSpec(16, ranks, sizes) for ranks in ((2, 1, 1), (2, 6, 6)))
    assert roomiest((24, 16), get_format("channel-ranks"), [small, large]) is large
