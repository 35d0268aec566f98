"""Codes come back from bytes as they went in, in exactly the bytes that a grid says."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.precision.grid import Precision
from tnlm.precision.packing import pack, unpack


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_round_trip(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, Precision(bits).packed(columns))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_codes_of_a_block_follow_one_another_lowest_bits_first():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    whole = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    assert bytes(pack(codes, 3)[0].tolist()) == whole.to_bytes(3, "little")
