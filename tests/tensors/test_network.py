from __future__ import annotations

import torch

from tnlm.tensors.network import Cost, Gauge, Network

SIZES = {"o": 6, "a": 2, "i": 5}
PLAIN = Network({"left": "oa", "right": "ai"}, "o", "i", SIZES)
FIXED = Network({"left": "oa", "right": "ai"}, "o", "i", SIZES, Gauge("left", "a"))


def test_the_equation_makes_the_matrix_of_that_shape():
    factors = [torch.randn(PLAIN.shape_of(name)) for name in PLAIN.factors]
    assert torch.einsum(PLAIN.equation, *factors).shape == PLAIN.shape == (6, 5)
    assert PLAIN.params == sum(factor.numel() for factor in factors)


def test_an_identity_block_saves_its_square_and_costs_an_order_of_rows():
    assert PLAIN.params - FIXED.params == 2**2
    assert (PLAIN.index_bytes, FIXED.gauge_rows, FIXED.index_bytes) == (0, 6, 48)


def test_costs_are_summed_field_by_field():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
